"""What a tier counts.  Counters only rise; bandwidth is bytes divided by the seconds spent moving them."""

import threading
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class TierStats:
    """Counters of one tier, added to by several threads.  A field read may be a moment old."""

    hits: int = 0  # chunks read and verified
    misses: int = 0  # reads that ended before the last ref, whatever the reason
    bad_frames: int = 0  # stored bytes that were not what was put there; each was dropped
    bytes_read: int = 0  # payload bytes of hits
    bytes_written: int = 0  # payload bytes sent to the medium (not of chunks it already had)
    errors: int = 0  # operations the medium refused or did not answer in time
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.write_seconds

    def add(self, **amounts: float) -> None:
        """Add to the named counters, together.  Raises AttributeError for an unknown name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> dict[str, float]:
        """All counters of one moment, by name."""
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_lock"}
