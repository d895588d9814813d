"""Devices: which one and with what dtype, free memory, release of models, vLLM's engine."""
