"""The map of the cache.  It decides; it never touches a byte.

It lives beside vLLM's scheduler, one writer, plain Python, memory only.  Each tier is a shelf of slots; a
chunk may stand on several shelves.  Every change is two-phase: begin_*() leases and reserves, settle()
commits once every rank has moved its bytes.  Between the two nothing can be evicted and nothing
half-written can be found.

Invariant: holdings are prefix-closed over the union of the shelves.  If a chunk is here, so is every chunk
before it; when a chunk leaves its last shelf, what stood behind it leaves too, for no lookup can reach it.
The index's divide-and-conquer lookup relies on this.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count

from cacheengine.evict import LRU, Evictor
from cacheengine.keys import ChunkKey
from cacheengine.plan import DISK, GONE, HOST, NO_PARENT, REDIS, Change, Move, Plan, Spill, Want
from cacheengine.shelf import Chunk, Ledger, Shelf

TIER_BITS = {HOST: 2, DISK: 4, REDIS: 8}


class Store:
    """`slots` is each tier's capacity in chunks; a tier that is off is not there."""

    def __init__(self, slots: dict[str, int], evictor: Callable[[], Evictor] = LRU) -> None:
        self._shelves = {tier: Shelf(n, evictor()) for tier, n in slots.items()}
        self._chunks: dict[ChunkKey, Chunk] = {}
        self._open: dict[int, Ledger] = {}
        self._arriving: dict[ChunkKey, int] = {}
        self._dirty: dict[ChunkKey, ChunkKey] = {}  # key → root
        self._orphans: set[ChunkKey] = set()  # out of reach, but leased: they go with their last lease
        self._ids = count(1)
        self.evicted = dict.fromkeys(slots, 0)

    # -- questions ---------------------------------------------------------------------------------

    def tier_of(self, key: ChunkKey) -> str | None:
        """The fastest local tier that holds `key`.  Changes nothing."""
        return next((tier for tier in (HOST, DISK) if key in self._at(tier)), None)

    def holds(self, key: ChunkKey) -> bool:
        return key in self._chunks

    def arriving(self, key: ChunkKey) -> bool:
        """A plan is bringing `key` to the host tier, where it is not yet."""
        return key in self._arriving and key not in self._at(HOST)

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def is_open(self, plan_id: int) -> bool:
        """The ranks have yet to report a leg of this plan."""
        return plan_id in self._open

    def fill(self) -> dict[str, tuple[int, int]]:
        """(used, capacity) in chunks for every tier."""
        return {tier: (len(shelf.at), shelf.slots) for tier, shelf in self._shelves.items()}

    def bits(self, key: ChunkKey) -> int:
        return sum(bit for tier, bit in TIER_BITS.items() if key in self._at(tier))

    def inventory(self) -> list[Change]:
        """Everything held.  Safe to call from another thread: it copies before it reads."""
        return [
            Change(c.root, key, bits) for key, c in list(self._chunks.items()) if (bits := self.bits(key))
        ]

    # -- plans -------------------------------------------------------------------------------------

    def begin_load(self, req_id: str, wants: Sequence[Want], remote: frozenset[ChunkKey]) -> Plan:
        """Lease what is here, reserve host slots for what comes from below.

        `remote` are keys just seen in Redis.  What has left meanwhile, or finds no host slot, becomes a
        GONE move: the ranks report it like any failed read, and the request recomputes it.
        """
        ledger = Ledger(tuple(w.key for w in wants))
        self._lease(ledger, wants)
        moves = []
        for want in wants:
            tier = self.tier_of(want.key) or (REDIS if want.key in remote else GONE)
            slot = self._at(tier).get(want.key, -1)
            host = slot
            if tier in (DISK, REDIS):
                host = self._reserve(HOST)
                tier = tier if host >= 0 else GONE
            if tier in (DISK, REDIS):
                ledger.reserved[want.key] = host
                ledger.source[want.key] = tier
                self._arriving[want.key] = self._arriving.get(want.key, 0) + 1
            moves.append(Move(want.key, want.parent, want.root, host, want.blocks, tier, slot))
        return self._opened(Plan(next(self._ids), "load", req_id, tuple(moves)), ledger, {"load"})

    def begin_save(self, req_id: str, wants: Sequence[Want]) -> Plan | None:
        """Reserve a host slot, and one on every lower tier, for each chunk nobody holds or is bringing.
        Stops at the first chunk that finds no host slot: a save is optional, a gap is not."""
        fresh: list[Want] = []
        hosts: list[int] = []
        planned: set[ChunkKey] = set()
        spare = frozenset(want.key for want in wants)  # a prompt never pushes out its own beginning
        for want in wants:
            if want.key in self._chunks or want.key in self._arriving or want.key in planned:
                continue
            if want.parent != NO_PARENT and want.parent not in self._chunks and want.parent not in planned:
                break  # its prefix is gone: nothing could ever reach it
            slot = self._reserve(HOST, spare)
            if slot < 0:
                break
            fresh.append(want)
            hosts.append(slot)
            planned.add(want.key)
        if not fresh:
            return None
        keys = tuple(want.key for want in fresh)
        ledger = Ledger(keys, dict(zip(keys, hosts, strict=True)), family=tuple(fresh))
        for want in fresh:
            self._arriving[want.key] = self._arriving.get(want.key, 0) + 1
        moves = tuple(Move(w.key, w.parent, w.root, s, w.blocks) for w, s in zip(fresh, hosts, strict=True))
        spills = tuple(
            Spill(tier, tuple(self._reserve(tier, spare) for _ in fresh))
            for tier in (DISK, REDIS)
            if tier in self._shelves
        )
        ledger.spills = {spill.tier: spill.slots for spill in spills}
        plan = Plan(next(self._ids), "save", req_id, moves, spills)
        return self._opened(plan, ledger, {HOST, *ledger.spills})

    def settle(self, plan_id: int, leg: str, kept: int) -> None:
        """Every rank has reported this leg of the plan; `kept` is the least of their words."""
        ledger = self._open[plan_id]
        ledger.legs.discard(leg)
        if leg == "load":
            self._settle_load(ledger, kept)
        elif leg == HOST:
            self._settle_save(ledger, kept)
        else:
            self._settle_spill(ledger, leg, kept)
        if not ledger.legs:
            del self._open[plan_id]
            for slot in ledger.waste:
                self._shelves[HOST].release(slot)
            self._unlease(ledger)
            self._forget_suspect(ledger)

    def _settle_load(self, ledger: Ledger, kept: int) -> None:
        for i, key in enumerate(ledger.keys):
            slot = ledger.reserved.get(key)
            if slot is None:
                continue
            self._landed(key)
            if i < kept and key in self._chunks:
                self._commit(HOST, key, slot)
            else:
                self._shelves[HOST].release(slot)
            if i == kept:  # what failed its read is not there, whatever the map says
                ledger.suspect = key
        self._touch(ledger.keys[kept - 1] if kept else NO_PARENT)

    def _settle_save(self, ledger: Ledger, kept: int) -> None:
        held = []
        for i, want in enumerate(ledger.family):
            self._landed(want.key)
            if i < kept and self._adopt(want):
                self._commit(HOST, want.key, ledger.reserved[want.key])
                held.append(want)
            else:
                ledger.waste.append(ledger.reserved[want.key])  # a writer may still read from it
        self._lease(ledger, held)  # until the last spill is done
        self._touch(held[-1].key if held else NO_PARENT)

    def _settle_spill(self, ledger: Ledger, tier: str, kept: int) -> None:
        shelf = self._shelves[tier]
        for i, (want, slot) in enumerate(zip(ledger.family, ledger.spills[tier], strict=True)):
            if slot < 0:
                continue
            if i < kept and want.key in self._chunks:
                self._commit(tier, want.key, slot)
            else:
                shelf.release(slot)
        stored = [want.key for want in ledger.family if want.key in shelf.at]
        self._touch(stored[-1] if stored else NO_PARENT)

    # -- other changes -----------------------------------------------------------------------------

    def learn(self, wants: Iterable[Want], tier: str) -> None:
        """Chunks seen in a tier that other workers fill too (Redis).  Prefix order; stops at a gap."""
        if tier not in self._shelves:
            return
        for want in wants:
            if want.key in self._at(tier):
                continue
            slot = self._reserve(tier)
            if slot < 0:
                return
            if not self._adopt(want):  # also when making room took its prefix away
                self._shelves[tier].release(slot)
                return
            self._commit(tier, want.key, slot)

    def unlearn(self, key: ChunkKey, tier: str) -> None:
        """The tier was asked and does not hold `key` after all."""
        if tier in self._shelves:
            self._remove(tier, key)

    def restore(self, tier: str, found: dict[int, tuple[ChunkKey, ChunkKey, ChunkKey]]) -> int:
        """Rebuild an unused shelf from what a restart found: slot → (key, parent, root).  Chunks whose
        prefix is not there are left out.  Returns how many were taken in."""
        shelf = self._shelves[tier]
        children: dict[ChunkKey, list[int]] = {}
        for slot, (_, parent, _) in found.items():
            if 0 <= slot < shelf.slots:
                children.setdefault(parent, []).append(slot)
        wave, taken = children.get(NO_PARENT, []), dict[ChunkKey, int]()
        while wave:
            later: list[int] = []
            for slot in wave:
                key, parent, root = found[slot]
                if key not in taken and self._adopt(Want(key, parent, root, ())):
                    taken[key] = slot
                    self._mark(key)
                    later += children.get(key, [])
            wave = later
        shelf.restore(taken)
        for key in reversed(taken):
            shelf.evictor.touch(key)
        return len(taken)

    def clear(self) -> None:
        """Forget everything that is not leased."""
        for key in [k for k, c in self._chunks.items() if not c.leases]:
            for tier in self._shelves:
                self._remove(tier, key)

    def drain_changes(self) -> list[Change]:
        """What changed since the last call, for the index: removals first."""
        changes = [Change(root, key, self.bits(key)) for key, root in self._dirty.items()]
        self._dirty.clear()
        return sorted(changes, key=lambda change: change.bits != 0)

    def check(self) -> None:
        """Prove the books: run when idle and after every test.  Raises AssertionError."""
        for tier, shelf in self._shelves.items():
            shelf.check(tier)
            assert all(key in self._chunks for key in shelf.at), f"{tier}: a chunk nobody knows"
        for key, chunk in self._chunks.items():
            assert self.bits(key), "a chunk on no shelf"
            assert chunk.leases >= 0, "more leases returned than taken"
            reachable = chunk.parent == NO_PARENT or chunk.parent in self._chunks
            assert reachable or (key in self._orphans and chunk.leases), "a gap in a prefix"
        if not self._open:
            assert not any(shelf.reserved for shelf in self._shelves.values()), "a leaked slot"
            assert not any(chunk.leases for chunk in self._chunks.values()), "a leaked lease"
            assert not self._arriving, "a chunk that never arrived"

    # -- inside ------------------------------------------------------------------------------------

    def _at(self, tier: str) -> dict[ChunkKey, int]:
        shelf = self._shelves.get(tier)
        return shelf.at if shelf else {}

    def _opened(self, plan: Plan, ledger: Ledger, legs: set[str]) -> Plan:
        ledger.legs = legs
        self._open[plan.id] = ledger
        return plan

    def _landed(self, key: ChunkKey) -> None:
        self._arriving[key] -= 1
        if not self._arriving[key]:
            del self._arriving[key]

    def _lease(self, ledger: Ledger, wants: Sequence[Want]) -> None:
        """Hold these chunks, and all before them, until the ledger closes: were an ancestor evicted, the
        slots behind it would be given to others while a rank still reads them."""
        keys = [want.key for want in wants if want.key in self._chunks]
        above = wants[0].parent if wants else NO_PARENT
        while (chunk := self._chunks.get(above)) is not None:
            keys.append(above)
            above = chunk.parent
        for key in keys:
            chunk = self._chunks[key]
            chunk.leases += 1
            ledger.leased.append((key, chunk))

    def _unlease(self, ledger: Ledger) -> None:
        for key, chunk in ledger.leased:
            chunk.leases -= 1
            if self._chunks.get(key) is chunk and not chunk.leases and key in self._orphans:
                self._orphans.discard(key)
                if chunk.parent in self._chunks:  # its prefix came back meanwhile
                    self._chunks[chunk.parent].children.add(key)
                else:
                    self._drop(key)

    def _forget_suspect(self, ledger: Ledger) -> None:
        """Not while somebody else reads it: its slot must stay its own, and they will find out too."""
        chunk = self._chunks.get(ledger.suspect) if ledger.suspect else None
        if ledger.suspect and chunk and not chunk.leases:
            self._remove(ledger.source[ledger.suspect], ledger.suspect)

    def _touch(self, key: ChunkKey) -> None:
        """`key` was used, and with it all before it: deepest first, so that no chunk is ever fresher than its
        parent and a prompt is given up from its end."""
        while (chunk := self._chunks.get(key)) is not None:
            for shelf in self._shelves.values():
                if key in shelf.at:
                    shelf.evictor.touch(key)
            key = chunk.parent

    def _mark(self, key: ChunkKey) -> None:
        self._dirty[key] = self._chunks[key].root

    def _adopt(self, want: Want) -> bool:
        """Know this chunk.  False where its prefix is not here."""
        if want.key in self._chunks:
            return True
        if want.parent != NO_PARENT:
            if want.parent not in self._chunks:
                return False
            self._chunks[want.parent].children.add(want.key)
        self._chunks[want.key] = Chunk(want.parent, want.root)
        return True

    def _commit(self, tier: str, key: ChunkKey, slot: int) -> None:
        self._shelves[tier].commit(key, slot)
        self._mark(key)

    def _reserve(self, tier: str, spare: frozenset[ChunkKey] = frozenset()) -> int:
        """A free slot, evicting one chunk if need be; -1 when everything is leased or to be spared."""
        shelf = self._shelves[tier]
        if not shelf.free:
            chunks = self._chunks
            victim = next(
                (k for k in shelf.evictor.victims() if not chunks[k].leases and k not in spare), None
            )
            if victim is not None:
                self.evicted[tier] += 1
                self._remove(tier, victim)
        return shelf.reserve() if shelf.free else -1

    def _remove(self, tier: str, key: ChunkKey) -> None:
        if self._shelves[tier].remove(key):
            self._mark(key)
            self._bury(key)

    def _drop(self, key: ChunkKey) -> None:
        self._mark(key)
        for shelf in self._shelves.values():
            shelf.remove(key)
        self._bury(key)

    def _bury(self, key: ChunkKey) -> None:
        """Forget a chunk that stands on no shelf any more, and with it everything behind it."""
        chunk = self._chunks.get(key)
        if chunk is None or self.bits(key):
            return
        del self._chunks[key]
        self._orphans.discard(key)
        if chunk.parent in self._chunks:
            self._chunks[chunk.parent].children.discard(key)
        below = list(chunk.children)
        while below:
            child = below.pop()
            grandchild = self._chunks[child]
            if grandchild.leases:
                self._orphans.add(child)
                continue
            self._mark(child)
            for shelf in self._shelves.values():
                shelf.remove(child)
            below += grandchild.children
            del self._chunks[child]
