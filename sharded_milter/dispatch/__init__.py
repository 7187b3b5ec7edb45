"""From a submitted job to its one answer, on whatever shards there are."""
