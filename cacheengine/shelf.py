"""What the store keeps its books in: the slots of one tier, a chunk's kin, what an open plan holds."""

from collections import OrderedDict
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
        self._taken: dict[str, int] = {}  # slots by tenant, reserved ones too
        self._untouched = 0  # slots from here on were never used; a million-slot shelf costs nothing empty
        self._returned: list[int] = []

    @property
    def free(self) -> int:
        return self.slots - self._untouched + len(self._returned)

    def has_room(self, tenant: str) -> bool:
        return self.free > 0 and not self._full_share(self._quota(tenant))

    def reserve(self, tenant: str) -> int:
        """REQUIRES has_room(tenant)."""
        self.reserved += 1
        self._count(tenant, 1)
        if self._returned:
            return self._returned.pop()
        self._untouched += 1
        return self._untouched - 1

    def release(self, slot: int, tenant: str) -> None:
        self.reserved -= 1
        self._count(tenant, -1)
        self._returned.append(slot)

    def commit(self, key: ChunkKey, slot: int, depth: int, tenant: str) -> None:
        """A reserved slot now holds `key`.  Where another plan was quicker, the slot is given back."""
        if key in self.at:
            self.release(slot, tenant)
            return
        self.reserved -= 1
        self.at[key] = slot
        self._order(tenant).add(key, depth)

    def hit(self, keys: Sequence[ChunkKey], tenant: str) -> None:
        """Those of `keys` that are here were used, in this order."""
        at, hit = self.at, self._order(tenant).hit
        for key in keys:
            if key in at:
                hit(key)

    def detach(self, key: ChunkKey, tenant: str) -> int:
        """`key` is not here any more, but its slot stays reserved: somebody still reads it.  -1: was not."""
        slot = self.at.pop(key, -1)
        if slot >= 0:
            self.reserved += 1
            self._order(tenant).forget(key)
        return slot

    def victims(self, tenant: str) -> Iterator[ChunkKey]:
        """Worst first, for room for a chunk of this tenant."""
        tenant = self._quota(tenant)
        if self._full_share(tenant):
            return self._order(tenant).victims()
        most = sorted(self._orders, key=lambda name: self._taken.get(name, 0), reverse=True)
        return chain.from_iterable(self._orders[name].victims() for name in most)

    def restore(self, found: dict[ChunkKey, tuple[int, int]]) -> None:
        """REQUIRES an unused shelf: key → (slot, depth), parents first; these slots are taken already."""
        self.at.update((key, slot) for key, (slot, _) in found.items())
        taken = set(self.at.values())
        self._untouched = max(taken, default=-1) + 1
        self._returned = [slot for slot in range(self._untouched - 1, -1, -1) if slot not in taken]
        self._taken = {"": len(taken)} if taken else {}
        for key, (_, depth) in reversed(found.items()):
            self._order("").add(key, depth)

    def check(self, name: str) -> None:
        total = self.free + len(self.at) + self.reserved
        assert total == self.slots, f"{name}: {total} of {self.slots} slots accounted for"
        assert len(set(self.at.values())) == len(self.at), f"{name}: two chunks in one slot"
        assert sum(self._taken.values()) == len(self.at) + self.reserved, f"{name}: quotas do not add up"
        assert all(n >= 0 for n in self._taken.values()), f"{name}: a tenant owes slots"

    def _quota(self, tenant: str) -> str:
        return tenant if self._share < 1 else ""

    def _full_share(self, tenant: str) -> bool:
        return self._share < 1 and self._taken.get(tenant, 0) >= max(1, int(self._share * self.slots))

    def _count(self, tenant: str, n: int) -> None:
        tenant = self._quota(tenant)
        self._taken[tenant] = self._taken.get(tenant, 0) + n
        if not self._taken[tenant]:  # tenants come and go; nothing is kept of one who has nothing here
            del self._taken[tenant]
            if tenant:
                self._orders.pop(tenant, None)

    def _order(self, tenant: str) -> Evictor:
        tenant = self._quota(tenant)
        if tenant not in self._orders:
            self._orders[tenant] = self._new_order()
        return self._orders[tenant]


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
