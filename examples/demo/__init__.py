"""The demo: similar prompts served by stock vLLM, with and without KVShare."""
