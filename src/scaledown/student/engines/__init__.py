"""What writes a student's answers: a protocol, and an engine a file."""
