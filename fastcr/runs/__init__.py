"""A run on a machine: its files, its processes, what it shows."""
