"""Data sets, and the prompts that measurements make of them."""
