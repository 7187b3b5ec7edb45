"""What runs in a worker process and nowhere else."""
