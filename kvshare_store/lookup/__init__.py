"""A prompt in, a plan out."""
