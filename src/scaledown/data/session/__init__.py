"""The parts of a run around its stages: inputs, result, workers, summary."""
