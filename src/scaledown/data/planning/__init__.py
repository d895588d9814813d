"""Estimates of what a run will cost, measured on a sample."""
