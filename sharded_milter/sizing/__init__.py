"""How many workers: a milter under load, what limits it, and what to do about it."""
