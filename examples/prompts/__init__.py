"""Prompts written for the examples: families of similar prompts, and unrelated prompts."""
