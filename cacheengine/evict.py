"""Who leaves first.  An Evictor is an order over keys, worst first; it owns no slots and no bytes.

A chunk is worth nothing without those before it, so the store evicts not the victim itself but the end of a
path behind it on the same shelf, and asks again for the next slot (docs/adr/0021-*.md).  A policy therefore
judges a prompt by the first of its chunks that it gives up, and knows no trees.

Every policy works in constant time a call, and its victims() costs what is read of it.  The measurements
that chose the default: docs/adr/0014-greedy-dual-evicts.md, and `python -m loadtests.replay_eviction`.
"""

from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Protocol

from cacheengine.keys import ChunkKey

_LFU_LEVELS = 255  # uses beyond are not told apart: an eight-bit counter, as in Redis
_S3_FREQUENCY = 3  # S3-FIFO counts in two bits
_S3_SMALL = 10  # one key in ten stands in the small queue
_MAX_USES = 8


class Evictor(Protocol):
    """The order of one shelf's keys.  One caller at a time; the caller stops reading victims() before it
    changes anything."""

    @abstractmethod
    def add(self, key: ChunkKey, depth: int) -> None:
        """`key` was stored on this shelf now; `depth` is its place in the prompt, 0 for the first chunk.
        A prompt's chunks arrive root first.  A key that is held already was used."""

    @abstractmethod
    def hit(self, key: ChunkKey) -> None:
        """`key` was used now.  Called deepest chunk first along a prefix, so that no chunk seems fresher than
        its parent.  Unknown keys are ignored."""

    @abstractmethod
    def forget(self, key: ChunkKey) -> None:
        """`key` is gone.  Unknown keys are fine."""

    @abstractmethod
    def victims(self) -> Iterator[ChunkKey]:
        """Every key once, worst first."""


class LRU(Evictor):
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, depth: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def hit(self, key: ChunkKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def forget(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)


class MRU(LRU):
    """Most recently used: keeps what came first.  For loops over more than fits; poor at anything else."""

    def victims(self) -> Iterator[ChunkKey]:
        return reversed(self._order)


class FIFO(LRU):
    """First in, first out: uses do not count."""

    def add(self, key: ChunkKey, depth: int) -> None:
        self._order.setdefault(key)

    def hit(self, key: ChunkKey) -> None:
        pass


class LFU(Evictor):
    """Least frequently used; among equals the least recently used.  It never ages: what was hot stays."""

    def __init__(self) -> None:
        self._uses: dict[ChunkKey, int] = {}
        self._levels = [OrderedDict[ChunkKey, None]() for _ in range(_LFU_LEVELS)]

    def add(self, key: ChunkKey, depth: int) -> None:
        if key in self._uses:
            return self.hit(key)
        self._uses[key] = 1
        self._levels[0][key] = None

    def hit(self, key: ChunkKey) -> None:
        if uses := self._uses.get(key):
            del self._levels[uses - 1][key]
            self._uses[key] = min(uses + 1, _LFU_LEVELS)
            self._levels[self._uses[key] - 1][key] = None

    def forget(self, key: ChunkKey) -> None:
        if uses := self._uses.pop(key, 0):
            del self._levels[uses - 1][key]

    def victims(self) -> Iterator[ChunkKey]:
        return chain.from_iterable(self._levels)


class S3FIFO(Evictor):
    """Three queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    New keys pass through a small queue.  What was used more than once there goes on to the main one; the
    rest leaves, and a ghost remembers its name: what returns soon enters the main queue at once, where every
    use, up to three, buys another round.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[ChunkKey, int] = OrderedDict()  # key → uses since it came, at most 3
        self._main: OrderedDict[ChunkKey, int] = OrderedDict()
        self._ghost = Ghost()

    def add(self, key: ChunkKey, depth: int) -> None:
        if key in self._small or key in self._main:
            return self.hit(key)
        queue = self._main if self._ghost.recall(key) else self._small
        queue[key] = 0

    def hit(self, key: ChunkKey) -> None:
        queue = self._small if key in self._small else self._main
        if key in queue:
            queue[key] = min(queue[key] + 1, _S3_FREQUENCY)

    def forget(self, key: ChunkKey) -> None:
        if self._small.pop(key, None) is not None:
            self._ghost.remember(key, 1)
        else:
            self._main.pop(key, None)
        self._ghost.trim(len(self._small) + len(self._main))

    def victims(self) -> Iterator[ChunkKey]:
        small, main = self._small, self._main
        self._settle()
        if len(small) * _S3_SMALL >= len(small) + len(main):
            return chain(small, main)
        return chain(main, small)

    def _settle(self) -> None:
        """Bring a key that may leave to the head of either queue.  Each step takes back what a hit gave."""
        while self._small and next(iter(self._small.values())) > 1:
            key, _ = self._small.popitem(last=False)
            self._main[key] = 0
        while self._main and (uses := next(iter(self._main.values()))):
            key, _ = self._main.popitem(last=False)
            self._main[key] = uses - 1


class GreedyDual(Evictor):
    """A use buys a key time, and the clock runs by evictions (GreedyDual, Young 1994; with frequency for the
    value, as in Cherkasova's GDSF, HP Labs 1998).

    A key's priority is the clock when it was last used plus its uses, at most eight.  The least priority
    leaves first, among equals the least recently used; the clock is the least priority held.  So a second use
    makes a key last longer than the first did, and what was hot and is not used any more leaves in the end.
    A ghost remembers the uses of what left.

    All slots cost alike and uses are small whole numbers, so a ring of queues holds the order, and no heap.
    """

    def __init__(self) -> None:
        self._held: dict[ChunkKey, tuple[OrderedDict[ChunkKey, None], int]] = {}  # key → its queue, its uses
        # What is held lies between the clock and the clock + _MAX_USES.  The queue of the clock stands first,
        # and time passes as an empty one goes to the end.
        self._ring = deque(OrderedDict[ChunkKey, None]() for _ in range(_MAX_USES + 1))
        self._ghost = Ghost()

    def add(self, key: ChunkKey, depth: int) -> None:
        if key in self._held:
            return self.hit(key)
        self._place(key, self._ghost.recall(key) + 1)

    def hit(self, key: ChunkKey) -> None:
        if (held := self._held.get(key)) is not None:
            queue, uses = held
            del queue[key]
            self._place(key, uses + 1)

    def forget(self, key: ChunkKey) -> None:
        if (held := self._held.pop(key, None)) is not None:
            queue, uses = held
            del queue[key]
            self._ghost.remember(key, uses)
            self._ghost.trim(len(self._held))

    def victims(self) -> Iterator[ChunkKey]:
        ring = self._ring
        while self._held and not ring[0]:
            ring.rotate(-1)
        return chain.from_iterable(ring)

    def _place(self, key: ChunkKey, uses: int) -> None:
        uses = min(uses, _MAX_USES)
        queue = self._ring[uses]
        self._held[key] = queue, uses
        queue[key] = None


class Ghost:
    """The uses of keys that left.  Its owner trims it to as many keys as it holds."""

    def __init__(self) -> None:
        self._uses: OrderedDict[ChunkKey, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._uses)

    def recall(self, key: ChunkKey) -> int:
        """0 for a key it does not know.  It came back: the ghost forgets it."""
        return self._uses.pop(key, 0)

    def remember(self, key: ChunkKey, uses: int) -> None:
        self._uses[key] = uses

    def trim(self, most: int) -> None:
        """Forget the oldest."""
        while len(self._uses) > most:
            self._uses.popitem(last=False)


EVICTORS: dict[str, Callable[[], Evictor]] = {
    "greedy_dual": GreedyDual,
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "mru": MRU,
    "s3fifo": S3FIFO,
}
DEFAULT_EVICTOR = "greedy_dual"
