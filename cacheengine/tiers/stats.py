"""What a tier counts.  Counters only rise."""

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class TierStats:
    """Counters of one tier, added to by several threads.  A field read may be a moment old."""

    hits: int = 0  # chunks read and verified
    misses: int = 0  # reads that ended before the last ref, whatever the reason
    bad_frames: int = 0  # stored bytes that were not what was put there; each was dropped
    bytes_read: int = 0  # payload bytes of hits
    bytes_written: int = 0  # payload bytes sent to the medium (not of chunks it already had)
    errors: int = 0  # operations the medium refused or did not answer in time
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: int) -> None:
        """Add to the named counters, together.  Raises AttributeError for an unknown name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)
