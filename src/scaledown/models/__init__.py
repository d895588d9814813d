"""Finds models by their names, on the hub or on disk, and loads their weights."""
