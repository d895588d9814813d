"""A run and what keeps it: its directory, stages, leases, workers and progress."""
