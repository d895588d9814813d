"""The report page of a run, and the figures it shows."""
