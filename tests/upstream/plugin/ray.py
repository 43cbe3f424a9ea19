"""Stands in for the package ray, which one module of vLLM's tests imports for GPU tests."""
