"""Inference with a trained model: compress documents, answer questions."""
