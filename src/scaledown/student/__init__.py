"""The student: a compressor of documents, and a generator that reads the compressed documents."""
