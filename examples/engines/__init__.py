"""A small model and real vLLM engines, for the examples, the benchmarks and the tests."""
