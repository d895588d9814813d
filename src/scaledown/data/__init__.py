"""From queries and a corpus to training data, one file per stage."""
