"""The map of the cache.  It decides; it never touches a byte.

It lives beside vLLM's scheduler, one writer at a time, plain Python, memory only.  Each tier is a shelf of
slots; a chunk may stand on several shelves.  Every change is two-phase: begin_*() leases and reserves,
settle() commits once every rank has moved its bytes.  Between the two nothing can be evicted and nothing
half-written can be found.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count

from cacheengine.evict import DEFAULT_EVICTOR, EVICTORS, Evictor
from cacheengine.holdings import LOWER, Holdings
from cacheengine.index_schema import Entry
from cacheengine.keys import ChunkKey
from cacheengine.plan import DISK, GONE, HOST, NO_PARENT, REDIS, Move, Plan, Want
from cacheengine.shelf import Ledger


class Store:
    """Plans over Holdings.  The parameters are those of Holdings."""

    def __init__(
        self,
        slots: Mapping[str, int],
        full: int = 1,
        evictor: Callable[[], Evictor] = EVICTORS[DEFAULT_EVICTOR],
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._held = Holdings(slots, full, evictor, share)
        self._host, self._disk = self._held.at(HOST), self._held.at(DISK)
        self._clock = clock
        self._open: dict[int, Ledger] = {}
        self._arriving: dict[ChunkKey, int] = {}
        self._sweep: Iterator[ChunkKey] = iter(())
        self._ids = count(1)

    # -- questions ---------------------------------------------------------------------------------

    def tier_of(self, key: ChunkKey) -> str | None:
        """The fastest local tier that holds `key`.  Changes nothing."""
        return HOST if key in self._host else DISK if key in self._disk else None

    def depth(self, keys: Sequence[ChunkKey], remote: Collection[ChunkKey] = ()) -> int:
        """How many leading `keys` are in a local tier or among `remote`."""
        host, disk = self._host, self._disk
        for i, key in enumerate(keys):
            if key not in host and key not in disk and key not in remote:
                return i
        return len(keys)

    def holds(self, key: ChunkKey) -> bool:
        return key in self._held.chunks

    def arriving(self, key: ChunkKey) -> bool:
        """A plan is bringing `key` to the host tier, where it is not yet."""
        return key in self._arriving and key not in self._host

    def expected(self, key: ChunkKey) -> bool:
        """Some plan under way stores `key`."""
        return key in self._arriving

    @property
    def busy(self) -> bool:
        return bool(self._open)

    @property
    def lower(self) -> tuple[str, ...]:
        """The tiers below the host that are on."""
        return tuple(self._held.backlog)

    def backlog(self, tier: str, cold: bool = True) -> int:
        """Chunks of the host tier to be written to a lower one; only those used again unless `cold`."""
        backlog = self._held.backlog[tier]
        return len(backlog.hot) + (len(backlog.cold) if cold else 0)

    def fill(self) -> dict[str, tuple[int, int]]:
        """(used, capacity) in chunks for every tier."""
        return {tier: (len(shelf.at), shelf.slots) for tier, shelf in self._held.shelves.items()}

    def lost(self) -> dict[tuple[str, str], int]:
        """Counts since start: ("evicted", tier), and ("unwritten", tier) for chunks that left the host tier
        before they were written there."""
        return {
            **{("evicted", tier): n for tier, n in self._held.evicted.items()},
            **{("unwritten", tier): n for tier, n in self._held.unwritten.items()},
        }

    def bits(self, key: ChunkKey) -> int:
        """The tiers that hold `key`, as the index writes them; 0 for none."""
        return self._held.bits(key)

    def inventory(self) -> list[Entry]:
        """Everything the index may know.  Safe to call from another thread."""
        return self._held.inventory()

    # -- plans -------------------------------------------------------------------------------------

    def begin_load(self, req_id: str, wants: Sequence[Want], remote: Collection[ChunkKey]) -> Plan:
        """Lease what is here, reserve host slots for what comes from below.

        `remote` are keys just seen in Redis.  What has left meanwhile, or finds no host slot, becomes a
        GONE move: the ranks report it like any failed read, and the request recomputes it.
        """
        ledger, moves = Ledger("load", tuple(wants), leased=self._held.lease(wants)), []
        spare = frozenset(want.key for want in wants)
        for want in wants:
            tier = self.tier_of(want.key) or (REDIS if want.key in remote else GONE)
            slot = host = self._held.at(tier).get(want.key, -1)
            if tier in LOWER:
                host = self._held.reserve(HOST, want.tenant, spare)
                tier = tier if host >= 0 else GONE
            if tier in LOWER:
                ledger.reserved[want.key] = host
                ledger.source[want.key] = tier
                self._expect(want.key)
            moves.append(Move(*want[:4], host, want.blocks, tier, slot))
        return self._opened(ledger, moves, req_id)

    def begin_save(self, req_id: str, wants: Sequence[Want], spare: Collection[ChunkKey] = ()) -> Plan | None:
        """Reserve a host slot for each chunk nobody holds or is bringing.  Stops at the first that finds none
        (a prompt never pushes out its own beginning, `spare`): a save is optional, a gap is not."""
        ledger, moves = Ledger("save", ()), []
        reserved, chunks, fresh = ledger.reserved, self._held.chunks, []
        for want in wants:
            if want.key in chunks or want.key in self._arriving or want.key in reserved:
                continue
            if want.parent != NO_PARENT and want.parent not in chunks and want.parent not in reserved:
                break  # its prefix is gone: nothing could ever reach it
            slot = self._held.reserve(HOST, want.tenant, spare)
            if slot < 0:
                break
            reserved[want.key] = slot
            fresh.append(want)
            moves.append(Move(*want[:4], slot, want.blocks))
        ledger.wants = tuple(fresh)
        for want in fresh:
            self._expect(want.key)
        return self._opened(ledger, moves, req_id) if fresh else None

    def begin_demote(self, tier: str, limit: int, cold: bool = True) -> Plan | None:
        """Write up to `limit` chunks of the host tier to a lower one; only those that were used again since
        they came, unless `cold`."""
        held, wants, moves, ledger = self._held, [], [], Ledger("demote", (), tier)
        last = NO_PARENT
        for key in held.backlog[tier].take(limit, cold):
            chunk = held.chunks.get(key)
            if chunk is None:  # making room for another made it unreachable
                continue
            want = Want(key, chunk.parent, chunk.root, chunk.size, (), chunk.tenant)
            lease = held.lease([want], last)  # first: the reservation may be looking for a victim
            slot = held.reserve(tier, chunk.tenant)
            if slot < 0:
                held.unlease(lease)
                held.unwritten[tier] += 1
                continue
            wants.append(want)
            last = key
            ledger.leased += lease
            ledger.reserved[key] = slot
            moves.append(Move(*want[:4], self._host[key], (), tier, slot))
        ledger.wants = tuple(wants)
        return self._opened(ledger, moves, "") if moves else None

    def settle(self, plan_id: int, kept: int) -> None:
        """Every rank has reported this plan; `kept` is the least of their words."""
        ledger = self._open.pop(plan_id)
        kept = 0 if ledger.void else kept
        settle = {"load": self._settle_load, "save": self._settle_save, "demote": self._settle_demote}
        settle[ledger.kind](ledger, kept)
        self._held.unlease(ledger.leased)
        if (key := ledger.suspect) and (chunk := self._held.chunks.get(key)) and not chunk.leases:
            # not while somebody else reads it: its slot must stay its own, and they will find out too
            self._held.remove(ledger.source[key], key)

    def _settle_load(self, ledger: Ledger, kept: int) -> None:
        for i, want in enumerate(ledger.wants):
            slot = ledger.reserved.get(want.key)
            if slot is None:
                continue
            self._landed(want.key)
            if i < kept and want.key in self._held.chunks:
                self._held.commit(HOST, want.key, slot)
                for tier in self.lower:
                    self._held.want_below(tier, [want.key])
            else:
                self._held.shelves[HOST].release(slot)
            if i == kept and not ledger.void:  # what failed its read is not there, whatever the map says
                ledger.suspect = want.key

    def _settle_save(self, ledger: Ledger, kept: int) -> None:
        held, stored, now = self._held, [], self._clock()
        for i, want in enumerate(ledger.wants):
            self._landed(want.key)
            if i < kept and held.adopt(want, now):
                stored.append(want.key)
            else:
                held.shelves[HOST].release(ledger.reserved[want.key])
        if stored:
            held.refresh(held.chunks[stored[0]].parent, now)
        for key in reversed(stored):  # deepest first: a prompt is given up from its end
            held.commit(HOST, key, ledger.reserved[key])
        for tier, backlog in held.backlog.items():
            for key in stored:
                if key not in held.at(tier):
                    backlog.add(key)

    def _settle_demote(self, ledger: Ledger, kept: int) -> None:
        held = self._held
        for i, want in enumerate(ledger.wants):
            slot = ledger.reserved[want.key]
            if i < kept and want.key in held.chunks:
                held.commit(ledger.tier, want.key, slot)
            else:
                held.vacate(ledger.tier, slot, ledger.erase)

    # -- other changes -----------------------------------------------------------------------------

    def use(self, key: ChunkKey) -> None:
        """A request uses `key`, and with it all before it.  To be said once a request."""
        self._held.use(key, self._clock())

    def learn(self, wants: Iterable[Want], tier: str) -> None:
        """Chunks seen in a tier that other workers fill too (Redis).  Prefix order; stops at a gap."""
        held = self._held
        if tier not in held.shelves:
            return
        for want in wants:
            if want.key in held.at(tier):
                continue
            slot = held.reserve(tier, want.tenant)
            if slot < 0:
                return
            if not held.adopt(want, self._clock()):  # also when making room took its prefix away
                held.shelves[tier].release(slot)
                return
            held.commit(tier, want.key, slot)

    def unlearn(self, key: ChunkKey, tier: str) -> None:
        """The tier was asked and does not hold `key` after all."""
        self._held.remove(tier, key)

    def restore(self, tier: str, found: Mapping[int, Want], used: Iterable[int] = ()) -> int:
        """Rebuild an unused shelf from what a restart found in its slots.  Chunks whose prefix is not there
        are left out.  `used`: slots that hold something else.  Returns how many were taken in."""
        held, now = self._held, self._clock()
        shelf = held.shelves[tier]
        children: dict[ChunkKey, list[int]] = {}
        for slot, want in found.items():
            if 0 <= slot < shelf.slots:
                children.setdefault(want.parent, []).append(slot)
        wave, taken = children.get(NO_PARENT, []), dict[ChunkKey, tuple[int, int]]()
        while wave:
            later: list[int] = []
            for slot in wave:
                want = found[slot]
                if want.key not in taken and held.adopt(want, now):
                    taken[want.key] = slot, held.chunks[want.key].depth
                    held.mark(want.key)
                    later += children.get(want.key, [])
            wave = later
        shelf.restore(taken, 1 + max((slot for slot in (*found, *used) if slot < shelf.slots), default=-1))
        return len(taken)

    def set_pins(self, keys: Collection[ChunkKey]) -> None:
        """Exactly these chunks, held now or later, are never evicted."""
        self._held.pins = frozenset(keys)
        self._held.keep_pinned()

    def pinned(self) -> int:
        """Pinned chunks that are here."""
        return sum(self.holds(key) for key in self._held.pins)

    def clear(self, erase: bool = True) -> list[int]:
        """Forget everything, also what is under way.  With `erase`, what is on disk must not come back with
        the next start: returns disk slots whose headers still say otherwise.  Make them empty, then call
        erased(); nobody is given them before."""
        held = self._held
        for ledger in self._open.values():
            ledger.void, ledger.erase = True, ledger.erase or erase
            for chunk in ledger.leased:
                chunk.erase = chunk.erase or erase
        read = list(self._disk.values()) if erase else []  # some may be in use and be named again later
        for key in [key for key, chunk in held.chunks.items() if chunk.parent == NO_PARENT]:
            held.bury(key, erase)
        if erase:
            held.erase_free()
        return [*read, *(held.erasing - set(read))]

    def to_erase(self) -> list[int]:
        """Disk slots that must be made empty: also those that came free since clear()."""
        return list(self._held.erasing)

    def erased(self, slots: Collection[int]) -> None:
        self._held.erased(slots)

    def expire(self, before: float, limit: int = 64) -> None:
        """Forget chunks last used before that time; looks at `limit` chunks a call, so that no step waits."""
        for _ in range(limit):
            key = next(self._sweep, None)
            if key is None:
                self._held.keep_pinned()
                self._sweep = iter(list(self._held.chunks))
                return
            chunk = self._held.chunks.get(key)
            if chunk and chunk.used < before and not chunk.leases and key not in self._held.kept:
                self._held.bury(key)

    def drain_changes(self) -> list[Entry]:
        """What changed since the last call, for the index: removals first."""
        return self._held.drain_changes()

    def check(self) -> None:
        """Prove the books: run when idle and after every test.  Raises AssertionError."""
        self._held.check()
        if not self._open:
            for tier, shelf in self._held.shelves.items():
                erasing = len(self._held.erasing) if tier == DISK else 0
                assert shelf.reserved == erasing, f"{tier}: a leaked slot"
            assert not any(c.leases for c in self._held.chunks.values()), "a leaked lease"
            assert not self._arriving, "a chunk that never arrived"

    # -- inside ------------------------------------------------------------------------------------

    def _opened(self, ledger: Ledger, moves: list[Move], req_id: str) -> Plan:
        plan = Plan(next(self._ids), ledger.kind, tuple(moves), req_id)
        self._open[plan.id] = ledger
        return plan

    def _expect(self, key: ChunkKey) -> None:
        self._arriving[key] = self._arriving.get(key, 0) + 1

    def _landed(self, key: ChunkKey) -> None:
        self._arriving[key] -= 1
        if not self._arriving[key]:
            del self._arriving[key]
