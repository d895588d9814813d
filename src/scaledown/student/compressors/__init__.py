"""The kinds of compressors, one module for each."""
