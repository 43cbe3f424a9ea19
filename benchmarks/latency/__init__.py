"""Time to first token in real engines."""
