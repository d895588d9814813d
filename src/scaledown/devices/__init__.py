"""GPUs and the engine that runs on them: which there are, what is free, how models are given back."""
