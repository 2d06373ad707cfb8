"""What this worker holds: chunks on shelves, each behind the chunk before it, some held still by a lease.

Invariant: holdings are prefix-closed over the union of the shelves.  If a chunk is here, so is every chunk
before it; when a chunk leaves its last shelf, what stood behind it leaves too, for no lookup can reach it.
The index's divide-and-conquer lookup relies on this.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from cacheengine import index_schema
from cacheengine.evict import Evictor
from cacheengine.index_schema import Entry
from cacheengine.keys import ChunkKey
from cacheengine.plan import DISK, HOST, NO_PARENT, REDIS, Want
from cacheengine.shelf import Backlog, Chunk, Shelf

TIER_BITS = {HOST: index_schema.HOST, DISK: index_schema.DISK, REDIS: index_schema.SHARED}
LOWER = (DISK, REDIS)


class Holdings:
    """`slots` is each tier's capacity in chunks, a tier that is off is not there; `full` is a full chunk's
    size in blocks (shorter ones are tails: never anybody's parent, never in the index); `share` is the part
    of each tier one tenant may fill."""

    def __init__(
        self, slots: Mapping[str, int], full: int, evictor: Callable[[], Evictor], share: float
    ) -> None:
        self.shelves = {tier: Shelf(n, evictor, share) for tier, n in slots.items()}
        self.chunks: dict[ChunkKey, Chunk] = {}
        self.backlog = {tier: Backlog() for tier in LOWER if tier in slots}
        self.pins: frozenset[ChunkKey] = frozenset()
        self.kept: set[ChunkKey] = set()  # pinned chunks that are here, and all before them
        self.erasing: set[int] = set()  # disk slots whose headers must go before they are used again
        self.evicted = dict.fromkeys(slots, 0)
        self.unwritten = dict.fromkeys(self.backlog, 0)  # chunks that left the host before they got there
        self._full = full
        self._trails: dict[str, list[ChunkKey]] = {tier: [] for tier in slots}
        self._dirty: dict[ChunkKey, ChunkKey] = {}  # key → root

    def at(self, tier: str) -> dict[ChunkKey, int]:
        shelf = self.shelves.get(tier)
        return shelf.at if shelf else {}

    def bits(self, key: ChunkKey) -> int:
        return sum(bit for tier, bit in TIER_BITS.items() if key in self.at(tier))

    def adopt(self, want: Want, now: float) -> bool:
        """Know this chunk.  False where its prefix is not here."""
        if want.key in self.chunks:
            return True
        depth = 0
        if want.parent != NO_PARENT:
            if (parent := self.chunks.get(want.parent)) is None:
                return False
            parent.children.add(want.key)
            depth = parent.depth + 1
        self.chunks[want.key] = Chunk(want.parent, want.root, want.size, depth, want.tenant, now)
        if want.key in self.pins:
            self._keep(want.key)
        return True

    def commit(self, tier: str, key: ChunkKey, slot: int) -> None:
        """REQUIRES an adopted key and a slot reserved for it."""
        chunk = self.chunks[key]
        self.shelves[tier].commit(key, slot, chunk.depth)
        if tier in self.backlog:
            self.backlog[tier].drop(key)
        self.mark(key)

    def reserve(self, tier: str, tenant: str, spare: Collection[ChunkKey] = ()) -> int:
        """A free slot, evicting one chunk if need be; -1 when everything is leased, pinned or spared.

        The policy names a chunk; what goes is the deepest chunk behind it on the same shelf, so leaves go
        first whatever the policy says.
        """
        shelf = self.shelves[tier]
        if (slot := shelf.reserve(tenant)) >= 0:
            return slot
        barred: set[ChunkKey] = set()  # what stands before a chunk that must stay: never walked twice
        for key in shelf.victims(tenant):
            leaf = self._leaf(tier, key, barred) if key not in barred else None
            if leaf is None:
                continue
            if not self.chunks[leaf].leases and leaf not in self.pins and leaf not in spare:
                self.evicted[tier] += 1
                self._trails[tier].pop()
                slot = self._detach(tier, leaf)
                self._left(leaf)
                return shelf.pass_on(slot, tenant)
            barred.update(self._trails[tier])
        return -1

    def remove(self, tier: str, key: ChunkKey) -> None:
        """`key` is on this shelf no longer."""
        chunk = self.chunks.get(key)
        if chunk is not None and key in self.at(tier):
            self._take(tier, key, chunk)
            self._left(key)

    def bury(self, key: ChunkKey, erase: bool = False) -> None:
        """Forget a chunk, wherever it is, and everything behind it.  `erase`: what is on disk must not come
        back with the next start."""
        chunk = self.chunks.get(key)
        if chunk is None:
            return
        if chunk.parent in self.chunks:
            self.chunks[chunk.parent].children.discard(key)
        below = [key]
        while below:
            gone = below.pop()
            chunk = self.chunks[gone]
            self.mark(gone)
            for tier, shelf in self.shelves.items():
                if gone in shelf.at:
                    self._take(tier, gone, chunk, erase)
            below += chunk.children
            del self.chunks[gone]

    def lease(self, wants: Sequence[Want], behind: ChunkKey = NO_PARENT) -> list[Chunk]:
        """Hold these chunks, and all before them: were an ancestor evicted, the slots behind it would be
        given to others while a rank still reads them.  The caller holds `behind` already in this way."""
        leased = [chunk for want in wants if (chunk := self.chunks.get(want.key))]
        above = self.chunks.get(wants[0].parent) if wants and wants[0].parent != behind else None
        while above is not None:
            leased.append(above)
            above = self.chunks.get(above.parent)
        for chunk in leased:
            chunk.leases += 1
        return leased

    def unlease(self, leased: Sequence[Chunk]) -> None:
        for chunk in leased:
            chunk.leases -= 1
            if not chunk.leases:
                for tier, slot in chunk.limbo:
                    self.vacate(tier, slot, chunk.erase)
                chunk.limbo.clear()

    def use(self, key: ChunkKey, now: float) -> None:
        """`key` is used, and with it all before it: deepest first, so that no chunk is ever fresher than its
        parent."""
        path = []
        while (chunk := self.chunks.get(key)) is not None:
            chunk.used = now
            path.append(key)
            key = chunk.parent
        for shelf in self.shelves.values():
            shelf.hit(path)
        path.reverse()
        for tier in self.backlog:
            self.want_below(tier, path)

    def keep_pinned(self) -> None:
        """Note anew which chunks pins stand on."""
        self.kept.clear()
        for key in self.chunks.keys() & self.pins:
            self._keep(key)

    def refresh(self, key: ChunkKey, now: float) -> None:
        """Something was put behind `key`: it and all before it do not expire first."""
        while (chunk := self.chunks.get(key)) is not None:
            chunk.used = now
            key = chunk.parent

    def want_below(self, tier: str, keys: Iterable[ChunkKey]) -> None:
        """These chunks have proved useful: write those of the host tier down that are not there."""
        host, there = self.at(HOST), self.at(tier)
        self.backlog[tier].warm([key for key in keys if key in host and key not in there])

    def vacate(self, tier: str, slot: int, erase: bool) -> None:
        """A reserved slot is free, or, with `erase` on disk, will be once it was made empty."""
        if erase and tier == DISK:
            self.erasing.add(slot)
        else:
            self.shelves[tier].release(slot)

    def erase_free(self) -> None:
        """What left the disk tier before is still in its slots, for the next start to find: not any more."""
        if DISK in self.shelves:
            self.erasing.update(self.shelves[DISK].reserve_used())

    def erased(self, slots: Collection[int]) -> None:
        """These disk slots hold nothing any more, whoever looks."""
        for slot in slots:
            if slot in self.erasing:
                self.erasing.discard(slot)
                self.shelves[DISK].release(slot)

    def mark(self, key: ChunkKey) -> None:
        chunk = self.chunks[key]
        if chunk.size == self._full:
            self._dirty[key] = chunk.root

    def drain_changes(self) -> list[Entry]:
        """What changed since the last call, for the index: removals first."""
        changes = [Entry(root, key, self.bits(key)) for key, root in self._dirty.items()]
        self._dirty.clear()
        return sorted(changes, key=lambda change: change.bits != 0)

    def inventory(self) -> list[Entry]:
        """Every full chunk.  Safe to call from another thread: it copies before it reads."""
        full = [(key, chunk) for key, chunk in list(self.chunks.items()) if chunk.size == self._full]
        return [Entry(chunk.root, key, bits) for key, chunk in full if (bits := self.bits(key))]

    def check(self) -> None:
        """Raises AssertionError."""
        for tier, shelf in self.shelves.items():
            shelf.check(tier)
            assert all(key in self.chunks for key in shelf.at), f"{tier}: a chunk nobody knows"
        for tier, backlog in self.backlog.items():
            for key in (*backlog.hot, *backlog.cold):
                assert key in self.at(HOST), f"a chunk to write to {tier} that is not here"
        for key, chunk in self.chunks.items():
            assert self.bits(key), "a chunk on no shelf"
            assert chunk.leases >= 0, "more leases returned than taken"
            assert chunk.leases or not chunk.limbo, "a slot nobody will free"
            assert chunk.parent == NO_PARENT or chunk.parent in self.chunks, "a gap in a prefix"
            assert all(self.chunks[child].parent == key for child in chunk.children), "a child that left"

    def _keep(self, key: ChunkKey) -> None:
        while key not in self.kept and (chunk := self.chunks.get(key)) is not None:
            self.kept.add(key)
            key = chunk.parent

    def _leaf(self, tier: str, key: ChunkKey, barred: set[ChunkKey]) -> ChunkKey | None:
        """The end of a path of this shelf's chunks that starts with `key`; None where each ends in `barred`.
        The path is kept: the next victim is likely the chunk before this one."""
        at, trail = self.shelves[tier].at, self._trails[tier]
        if not trail or trail[0] != key or trail[-1] not in at:
            trail[:] = [key]
        while True:
            children = self.chunks[trail[-1]].children
            below = next((c for c in children if c in at and c not in barred), None)
            if below is not None:
                trail.append(below)
            elif barred.isdisjoint(children):
                return trail[-1]
            else:
                barred.update(trail)
                return None

    def _take(self, tier: str, key: ChunkKey, chunk: Chunk, erase: bool = False) -> None:
        """Off one shelf; the slot is free when nobody reads it any more."""
        slot = self._detach(tier, key)
        if chunk.leases:
            chunk.limbo.append((tier, slot))
        else:
            self.vacate(tier, slot, erase)

    def _detach(self, tier: str, key: ChunkKey) -> int:
        if tier == HOST:
            for lower, backlog in self.backlog.items():
                self.unwritten[lower] += backlog.drop(key)
        return self.shelves[tier].detach(key)

    def _left(self, key: ChunkKey) -> None:
        """`key` left a shelf: was it the last?"""
        self.mark(key)
        for shelf in self.shelves.values():
            if key in shelf.at:
                return
        self.bury(key)
