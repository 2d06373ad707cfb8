"""Other people's caches behind the same vLLM on the same machine.  Never imported by the product."""
