"""What people see: figures, pages, the terminal; they read a run and nothing else."""
