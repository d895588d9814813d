"""Output: training data in its formats, TREC runs, datasets for the Hub."""
