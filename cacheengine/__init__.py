"""The tiered KV cache engine that runs inside vLLM workers."""
