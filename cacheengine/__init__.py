"""The tiered KV cache engine that runs inside vLLM workers."""

from cacheengine.config import ConfigError
from cacheengine.offline import transfer_config

__all__ = ["ConfigError", "transfer_config"]
