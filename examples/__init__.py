"""Examples, and what they share with the benchmarks and the tests."""
