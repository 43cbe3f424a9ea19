"""The chat example: conversations through `kvshare vllm serve`, beside vLLM alone."""
