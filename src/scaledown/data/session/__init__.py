"""What surrounds the stages of a run: its inputs, its result, its workers, its summary."""
