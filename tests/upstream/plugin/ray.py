"""Stands for the package ray, which a module of vLLM's tests imports for tests that need a GPU."""
