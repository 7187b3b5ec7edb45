"""The worker processes: which there are, and what replaces one that ends."""
