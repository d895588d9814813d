"""Which queries are left out: those of evaluation sets, and duplicates."""
