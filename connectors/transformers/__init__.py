"""KVShare on a Hugging Face model: the same plans as in vLLM, one readable forward, exact masks.

The reference engine: for tests, for methods that need deviations or attention scores, and for
machines without vLLM.
"""
