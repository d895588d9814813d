"""What is written: training data in its formats, rankings, data sets on the Hub."""
