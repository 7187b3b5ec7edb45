"""Ways to write milters. A dialect answers a transcript, in a worker or anywhere else."""
