"""Prompts written for the examples: families of similar prompts, and prompts that have no like."""
