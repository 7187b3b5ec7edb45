"""One question per script: `python -m bench.peers`, from the root of a checkout."""
