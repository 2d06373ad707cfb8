"""What the store keeps its books in: the slots of one tier, a chunk's kin, what an open plan holds."""

from dataclasses import dataclass, field

from cacheengine.evict import Evictor
from cacheengine.keys import ChunkKey
from cacheengine.plan import Want


class Shelf:
    """Every slot is free, reserved (bytes on their way) or committed to one key."""

    def __init__(self, slots: int, evictor: Evictor) -> None:
        self.slots = slots
        self.at: dict[ChunkKey, int] = {}
        self.reserved = 0
        self.evictor = evictor
        self._untouched = 0  # slots from here on were never used; a million-slot shelf costs nothing empty
        self._returned: list[int] = []

    @property
    def free(self) -> int:
        return self.slots - self._untouched + len(self._returned)

    def reserve(self) -> int:
        """REQUIRES free > 0."""
        self.reserved += 1
        if self._returned:
            return self._returned.pop()
        self._untouched += 1
        return self._untouched - 1

    def release(self, slot: int) -> None:
        self.reserved -= 1
        self._returned.append(slot)

    def commit(self, key: ChunkKey, slot: int) -> None:
        """A reserved slot now holds `key`.  Where another plan was quicker, the slot is given back."""
        if key in self.at:
            self.release(slot)
        else:
            self.reserved -= 1
            self.at[key] = slot
        self.evictor.touch(key)

    def remove(self, key: ChunkKey) -> bool:
        slot = self.at.pop(key, None)
        if slot is None:
            return False
        self._returned.append(slot)
        self.evictor.forget(key)
        return True

    def restore(self, found: dict[ChunkKey, int]) -> None:
        """REQUIRES an unused shelf: these slots are taken already."""
        self.at = dict(found)
        taken = set(found.values())
        self._untouched = max(taken, default=-1) + 1
        self._returned = [slot for slot in range(self._untouched - 1, -1, -1) if slot not in taken]

    def check(self, name: str) -> None:
        total = self.free + len(self.at) + self.reserved
        assert total == self.slots, f"{name}: {total} of {self.slots} slots accounted for"
        assert len(set(self.at.values())) == len(self.at), f"{name}: two chunks in one slot"


@dataclass(slots=True)
class Chunk:
    """A chunk that stands on some shelf: its place in the tree of prompts, and who holds it still."""

    parent: ChunkKey
    root: ChunkKey
    leases: int = 0
    children: set[ChunkKey] = field(default_factory=set)


@dataclass(slots=True)
class Ledger:
    """What an open plan has leased and reserved."""

    keys: tuple[ChunkKey, ...]
    reserved: dict[ChunkKey, int] = field(default_factory=dict)  # host slots on their way
    source: dict[ChunkKey, str] = field(default_factory=dict)  # where a load reads from
    family: tuple[Want, ...] = ()  # what a save brings
    spills: dict[str, tuple[int, ...]] = field(default_factory=dict)
    leased: list[tuple[ChunkKey, Chunk]] = field(default_factory=list)
    waste: list[int] = field(default_factory=list)  # host slots to give back at the end
    suspect: ChunkKey | None = None  # the chunk whose read failed
    legs: set[str] = field(default_factory=set)
