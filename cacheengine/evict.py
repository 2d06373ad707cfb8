"""Who leaves first.  An Evictor is an order over keys, worst first; it owns no slots and no bytes."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from cacheengine.keys import ChunkKey


class Evictor(Protocol):
    """The caller touches a prefix deepest chunk first, so that a chunk is never fresher than its parent
    and victims come tail first."""

    def touch(self, key: ChunkKey) -> None:
        """`key` was stored or used now."""

    def forget(self, key: ChunkKey) -> None:
        """`key` is gone.  Unknown keys are fine."""

    def victims(self) -> Iterator[ChunkKey]:
        """Every key, worst first.  The caller stops reading before it changes anything."""


class LRU:
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def touch(self, key: ChunkKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def forget(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)
