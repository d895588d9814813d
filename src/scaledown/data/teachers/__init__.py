"""Engines that answer prompts, one file each."""
