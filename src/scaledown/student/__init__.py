"""The student: a compressor of documents and a generator that reads what it leaves of them."""
