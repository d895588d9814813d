"""The compressors, a module each."""
