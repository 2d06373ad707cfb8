"""Prompts being prefilled right now: the index has not heard of them, the next request should."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from cacheengine.keys import ChunkKey


class PendingPrefixes:
    """Chunk key → the worker it was last sent to.  Bounded; entries expire.

    A prompt is entered whole, so what is held is prefix-closed and a bisection finds the depth.
    """

    def __init__(self, clock: Callable[[], float], seconds: float = 10.0, capacity: int = 65_536) -> None:
        self._clock, self._seconds, self._capacity = clock, seconds, capacity
        self._sent: OrderedDict[ChunkKey, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def sent(self, keys: Sequence[ChunkKey], worker_id: str) -> None:
        """This prompt goes to this worker now."""
        there = (worker_id, self._clock() + self._seconds)
        for key in reversed(keys):  # the front ends up youngest: tails are forgotten first
            self._sent[key] = there
            self._sent.move_to_end(key)
        while len(self._sent) > self._capacity:
            self._sent.popitem(last=False)

    def find(self, keys: Sequence[ChunkKey]) -> tuple[str, int]:
        """(worker, how many leading chunks are on their way there), or ("", 0)."""
        now = self._clock()
        lo, hi = 0, len(keys)
        while lo < hi:
            mid = (lo + hi + 1) // 2
            if self._sent.get(keys[mid - 1], ("", now))[1] > now:
                lo = mid
            else:
                hi = mid - 1
        return (self._sent[keys[lo - 1]][0], lo) if lo else ("", 0)
