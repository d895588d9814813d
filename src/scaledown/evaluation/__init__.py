"""Measures of answers and rankings, with confidence intervals and tests."""
