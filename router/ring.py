"""Consistent hashing: where a prompt goes that nobody holds, the same at every gateway."""

from collections.abc import Iterable

from uhashring import HashRing


class Ring:
    """Immutable.  One worker more or less moves 1/N of the keys."""

    def __init__(self, worker_ids: Iterable[str]) -> None:
        self.members = tuple(sorted(set(worker_ids)))
        self._ring = HashRing(nodes=list(self.members))

    def order(self, key: bytes, n: int | None = None) -> list[str]:
        """The first `n` (default: all) workers for this key, best first."""
        if not self.members:
            return []
        size = len(self.members) if n is None else min(n, len(self.members))
        return [node["nodename"] for node in self._ring.range(key.hex(), size)] if size else []
