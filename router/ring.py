"""Consistent hashing: where a prompt goes that nobody holds, the same at every gateway."""

from bisect import bisect
from collections.abc import Iterable
from hashlib import md5

from uhashring import HashRing


class Ring:
    """Immutable.  One worker more or less moves 1/N of the keys."""

    def __init__(self, worker_ids: Iterable[str]) -> None:
        points = HashRing(nodes=sorted(set(worker_ids)), hash_fn=_place).get_points()
        self._points = [point for point, _ in points]
        self._nodes = [node for _, node in points] * 2  # from every point once around
        self._size = len(set(self._nodes))

    def order(self, key: bytes) -> list[str]:
        """All workers for this key, best first."""
        start = bisect(self._points, _place(key.hex()))
        steps = 4 * self._size  # often enough to meet everybody
        while len(found := dict.fromkeys(self._nodes[start : start + steps])) < self._size:
            steps *= 2
        return list(found)


def _place(name: str) -> int:
    """On the ring: as uhashring has it where nothing else is said."""
    return int.from_bytes(md5(name.encode()).digest(), "big")
