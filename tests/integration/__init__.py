"""Real MTAs and the real daemon. Nothing of the machine's own mail system is touched."""
