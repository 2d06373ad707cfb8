"""Consistent hashing: where a prompt goes that nobody holds, the same at every gateway."""

from collections.abc import Iterable

from uhashring import HashRing


class Ring:
    """Immutable.  One worker more or less moves 1/N of the keys."""

    def __init__(self, worker_ids: Iterable[str]) -> None:
        members = sorted(set(worker_ids))
        self._ring, self._size = HashRing(nodes=members), len(members)

    def order(self, key: bytes) -> list[str]:
        """All workers for this key, best first."""
        return [node["nodename"] for node in self._ring.range(key.hex(), self._size)]
