"""Cleaning: queries of evaluation sets and duplicate queries are left out."""
