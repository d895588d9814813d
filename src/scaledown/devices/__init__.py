"""GPUs and vLLM's engine: available devices, free memory, release of models."""
