"""Training: examples, passes, schedule, checkpoints."""
