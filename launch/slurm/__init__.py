"""Runs as jobs of a Slurm cluster: `run.sbatch` is such a job, `submit` queues many."""
