"""A prompt becomes a node."""
