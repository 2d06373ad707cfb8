"""What the store keeps its books in: the slots of one tier, a chunk's kin, what an open plan holds."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from cacheengine.evict import Evictor
from cacheengine.keys import ChunkKey
from cacheengine.plan import Kind, Want


class Shelf:
    """Every slot is free, reserved (bytes on their way, or leaving) or committed to one key.

    With `share` below 1 no tenant gets more than that share of the slots: beyond it a tenant makes room
    among its own chunks, and below it among those of whoever has most.
    """

    def __init__(self, slots: int, evictor: Callable[[], Evictor], share: float = 1.0) -> None:
        self.slots = slots
        self.at: dict[ChunkKey, int] = {}
        self.reserved = 0
        self._new_order, self._share = evictor, share
        self._orders: dict[str, Evictor] = {}  # by tenant; "" for all where there is no quota
        self._owner: dict[int, str] = {}  # of each slot in use, where there is one
        self._taken: dict[str, int] = {}  # slots by tenant, reserved ones too
        self._untouched = 0  # slots from here on were never used; a million-slot shelf costs nothing empty
        self._returned: list[int] = []

    @property
    def free(self) -> int:
        return self.slots - self._untouched + len(self._returned)

    def reserve(self, tenant: str) -> int:
        """A slot, which counts to this tenant until it is released; -1 where there is no room."""
        if self._share < 1 and self._full_share(tenant):
            return -1
        if self._returned:
            slot = self._returned.pop()
        elif self._untouched < self.slots:
            slot, self._untouched = self._untouched, self._untouched + 1
        else:
            return -1
        self.reserved += 1
        if self._share < 1:
            self._owner[slot] = tenant
            self._taken[tenant] = self._taken.get(tenant, 0) + 1
        return slot

    def pass_on(self, slot: int, tenant: str) -> int:
        """A slot detached with nobody reading it is reserved anew; -1 where this tenant may have no more."""
        if self._share >= 1:
            return slot
        self.release(slot)
        return self.reserve(tenant)

    def release(self, slot: int) -> None:
        self.reserved -= 1
        self._returned.append(slot)
        if self._share < 1:
            tenant = self._owner.pop(slot)
            self._taken[tenant] -= 1
            if not self._taken[tenant]:  # tenants come and go; nothing is kept of one who has nothing here
                del self._taken[tenant]
                self._orders.pop(tenant, None)

    def reserve_used(self) -> list[int]:
        """Every free slot that may still hold what it held before, for nobody."""
        slots, self._returned = self._returned, []
        self.reserved += len(slots)
        if self._share < 1 and slots:
            self._owner.update(dict.fromkeys(slots, ""))
            self._taken[""] = self._taken.get("", 0) + len(slots)
        return slots

    def commit(self, key: ChunkKey, slot: int, depth: int) -> None:
        """A reserved slot now holds `key`.  Where another plan was quicker, the slot is given back."""
        if key in self.at:
            self.release(slot)
            return
        self.reserved -= 1
        self.at[key] = slot
        self._order(slot).add(key, depth)

    def hit(self, keys: Sequence[ChunkKey]) -> None:
        """Those of `keys`, chunks of one prompt, that are here were used, in this order."""
        at = self.at
        for key in keys:
            if (slot := at.get(key)) is not None:
                self._order(slot).hit(key)

    def detach(self, key: ChunkKey) -> int:
        """`key` is here no more, but its slot stays reserved: somebody may still read it.  -1: it was not."""
        slot = self.at.pop(key, -1)
        if slot >= 0:
            self.reserved += 1
            self._order(slot).forget(key)
        return slot

    def victims(self, tenant: str) -> Iterator[ChunkKey]:
        """Worst first, for room for a chunk of this tenant."""
        if self._share >= 1:
            return self._orders[""].victims() if self._orders else iter(())
        if self._full_share(tenant):
            most = [tenant]
        else:
            most = sorted(self._orders, key=lambda name: self._taken.get(name, 0), reverse=True)
        return chain.from_iterable(self._orders[name].victims() for name in most if name in self._orders)

    def restore(self, found: dict[ChunkKey, tuple[int, int]], used: int) -> None:
        """REQUIRES an unused shelf: key → (slot, depth), parents first; these slots are taken already, and
        of the first `used` the others hold something too, though nothing that can be found.
        Whose they are nobody knows any more."""
        self.at.update((key, slot) for key, (slot, _) in found.items())
        taken = set(self.at.values())
        self._untouched = used
        self._returned = [slot for slot in range(self._untouched - 1, -1, -1) if slot not in taken]
        if self._share < 1 and taken:
            self._owner, self._taken = dict.fromkeys(taken, ""), {"": len(taken)}
        for key, (slot, depth) in reversed(found.items()):
            self._order(slot).add(key, depth)

    def check(self, name: str) -> None:
        total = self.free + len(self.at) + self.reserved
        assert total == self.slots, f"{name}: {total} of {self.slots} slots accounted for"
        assert len(set(self.at.values())) == len(self.at), f"{name}: two chunks in one slot"
        if self._share < 1:
            assert len(self._owner) == len(self.at) + self.reserved, f"{name}: a slot without an owner"
            assert self._taken == Counter(self._owner.values()), f"{name}: quotas do not add up"

    def _full_share(self, tenant: str) -> bool:
        return self._share < 1 and self._taken.get(tenant, 0) >= max(1, int(self._share * self.slots))

    def _order(self, slot: int) -> Evictor:
        tenant = self._owner[slot] if self._share < 1 else ""
        if (order := self._orders.get(tenant)) is None:
            order = self._orders[tenant] = self._new_order()
        return order


class Backlog:
    """Chunks in the host tier that a lower tier does not hold yet: used again since they were stored (hot),
    or not (cold); each in the order they were stored, so that a prefix is written from its front."""

    def __init__(self) -> None:
        self.hot: OrderedDict[ChunkKey, None] = OrderedDict()
        self.cold: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey) -> None:
        if key not in self.hot:
            self.cold[key] = None

    def warm(self, keys: Iterable[ChunkKey]) -> None:
        """These were used again; first chunk of the prompt first."""
        for key in keys:
            self.cold.pop(key, None)
            self.hot.setdefault(key)

    def drop(self, key: ChunkKey) -> bool:
        """Whether it was on the list."""
        return self.hot.pop(key, False) is None or self.cold.pop(key, False) is None

    def take(self, limit: int, cold: bool) -> list[ChunkKey]:
        """Up to `limit` keys to write now; they are off the list."""
        taken: list[ChunkKey] = []
        for queue in (self.hot, self.cold) if cold else (self.hot,):
            while queue and len(taken) < limit:
                taken.append(queue.popitem(last=False)[0])
        return taken


@dataclass(slots=True)
class Chunk:
    """A chunk that stands on some shelf: its place in the tree of prompts, and who holds it still."""

    parent: ChunkKey
    root: ChunkKey
    size: int  # blocks
    depth: int
    tenant: str
    used: float  # when last
    leases: int = 0
    children: set[ChunkKey] = field(default_factory=set)
    limbo: list[tuple[str, int]] = field(default_factory=list)  # (tier, slot) to free with the last lease
    erase: bool = False  # and to be emptied before that, on disk


@dataclass(slots=True)
class Ledger:
    """What an open plan has leased and reserved."""

    kind: Kind
    wants: tuple[Want, ...]
    tier: str = ""  # where a demotion goes
    reserved: dict[ChunkKey, int] = field(default_factory=dict)  # slots on their way
    source: dict[ChunkKey, str] = field(default_factory=dict)  # where a load reads from
    leased: list[Chunk] = field(default_factory=list)
    suspect: ChunkKey | None = None  # the chunk whose read failed
    void: bool = False  # the cache was cleared meanwhile: whatever arrives is not kept
    erase: bool = False  # nor may a restart find it
