"""What is read: corpora, queries, right answers and training data, from files and addresses."""
