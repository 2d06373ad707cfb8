"""What can go wrong in the cache, drawn.

CacheError
  BadFrame        bytes came back, but not the bytes that were put (counted, dropped, a miss)
  TierDown        this tier cannot answer now (skipped; its breaker opens)
  IndexDown       the chunk index cannot answer in time (route by ring)
  LayoutMismatch  a KV cache this engine does not understand (loud, at start)

A miss is not an error: it is a shorter prefix.  No CacheError ever reaches the serving engine's step.
"""


class CacheError(Exception):
    """Root of everything the cache raises on purpose."""


class BadFrame(CacheError):
    """Stored bytes fail their magic, namespace, key, length or checksum."""


class TierDown(CacheError):
    """A tier did not answer, or answered with an error that is not a miss."""


class IndexDown(CacheError):
    """The chunk index did not answer within its deadline."""


class LayoutMismatch(CacheError):
    """The serving engine's KV cache has a shape the engine cannot move safely."""
