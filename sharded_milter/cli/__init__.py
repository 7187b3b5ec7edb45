"""The programs: `sharded-milter`, the daemon, and `sharded-milterctl`, everything else."""
