"""Who leaves first.  An Evictor is an order over keys, worst first; it owns no slots and no bytes."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from cacheengine.keys import ChunkKey


class Evictor(Protocol):
    """The caller touches a prefix deepest chunk first, so that a chunk is never fresher than its parent
    and victims come tail first."""

    def add(self, key: ChunkKey, depth: int) -> None:
        """`key` was stored now; `depth` is its place in the prompt."""

    def hit(self, key: ChunkKey) -> None:
        """`key` was used now."""

    def forget(self, key: ChunkKey) -> None:
        """`key` is gone.  Unknown keys are fine."""

    def victims(self) -> Iterator[ChunkKey]:
        """Every key, worst first.  The caller stops reading before it changes anything."""


class LRU:
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, depth: int) -> None:
        self._order[key] = None

    def hit(self, key: ChunkKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def forget(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)


EVICTORS: dict[str, Callable[[], Evictor]] = {"lru": LRU}
