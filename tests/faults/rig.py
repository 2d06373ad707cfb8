"""A serving engine in miniature: real map, planner, mover and tiers over a paged cache of a few pages.

It steps as vLLM does through connectors/scheduler.py and rank.py: ask, allocate, plan, load, compute, save,
poll, report.  Computing a token writes bytes that follow from all tokens up to it, so whatever a load brings
is compared, bit for bit, with what computing would have written.  All that knows how store, planner and mover
are called is in this file.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from cacheengine import ops
from cacheengine.arena import Arena
from cacheengine.connectors.demoter import Demoter, Write
from cacheengine.connectors.planner import Geometry, Planner, Scheduled
from cacheengine.errors import CacheError, TierDown
from cacheengine.evict import DEFAULT_EVICTOR, EVICTORS
from cacheengine.keys import ChunkKey, KeyScheme, Namespace, digest
from cacheengine.metrics import Tally
from cacheengine.mover import Mover, Outcome
from cacheengine.plan import DISK, HOST, NO_PARENT, REDIS, Want
from cacheengine.store import Store
from cacheengine.tier import Ref, Tier
from cacheengine.tiers.disk import DiskTier, erase, scan, slots_in
from cacheengine.tiers.redis import RedisTier
from cacheengine.tiers.stats import TierStats
from cacheengine.tiers.wrap import Breaker

BLOCK, CHUNK, LAYERS = 16, 64, 2  # tokens, tokens, layers
TOKEN_BYTES = 68  # of one layer
PAYLOAD = LAYERS * CHUNK * TOKEN_BYTES  # 8,704: not a multiple of a page
SCHEME = KeyScheme(Namespace(digest(b"fault rig")), CHUNK)
MODEL = "org/mini"
STEP_TOKENS = 96  # computed in one step over all requests: prompts are prefilled in pieces
_POISON = 0xEE  # in pages nobody owns
_PATIENCE_SECONDS = 0.3
_BREAKER_SECONDS = 0.05
_STUCK_SECONDS = 30.0


@dataclass
class Request:
    """One request's life: waiting → loading → running → done."""

    id: str
    tokens: tuple[int, ...]
    on_device: int = 0  # tokens the device's own prefix cache has
    salt: str = ""
    state: str = "waiting"
    blocks: list[int] = field(default_factory=list)
    promised: int = 0  # tokens that a load is bringing, with those on the device
    computed: int = 0
    loaded: int = 0  # tokens that came from the cache in the end
    aborted: bool = False


class MiniEngine:
    """`tiers` lie below the host arena of `host` chunks, by name, without their breakers.

    `between` runs after a look-up has promised something and before its load is planned: the moment in which
    a tier may lose what it was just seen to hold.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier] | None = None,
        *,
        host: int = 6,
        slots: Mapping[str, int] | None = None,
        pages: int = 96,
        io_threads: int = 2,
        write: Write = "behind",
        write_queue: int = 64,
        share: float = 1.0,
        eviction: str = DEFAULT_EVICTOR,
        patience: float = _PATIENCE_SECONDS,
        restore: Mapping[int, Want] | None = None,
    ) -> None:
        self.pages = torch.full((LAYERS, pages, BLOCK, TOKEN_BYTES), _POISON, dtype=torch.uint8)
        self.store = Store({HOST: host, **(slots or {})}, CHUNK // BLOCK, EVICTORS[eviction], share)
        if restore is not None:
            self.store.restore(DISK, restore)
        self.tally = Tally()
        self.tiers = {name: Breaker(tier, 3, _BREAKER_SECONDS) for name, tier in (tiers or {}).items()}
        self._probe = _Probe(Breaker(tiers[REDIS], 3, _BREAKER_SECONDS)) if tiers and REDIS in tiers else None
        self.planner = Planner(
            SCHEME, Geometry(CHUNK, PAYLOAD, BLOCK, 1), self.store,
            Demoter(self.store, write, write_queue),
            self._probe.ask if self._probe else _nobody, patience, self.tally,
        )  # fmt: skip
        self.mover = Mover(
            ops.Paged.of(list(self.pages)), Arena(host, PAYLOAD), self.tiers,
            io_threads=io_threads, cores=frozenset(), verify_loads=True,
        )  # fmt: skip
        self.between: Callable[[], object] = lambda: None
        self.host = host
        self.hits = 0  # tokens that came from the cache, over all requests
        self.served = 0
        self._free = list(range(pages))
        self._live: dict[str, Request] = {}
        self._owed: set[int] = set()  # plans the mover has yet to report
        self._ids = 0
        self._erase: Callable[[Sequence[int]], None] = _nothing_to_erase

    # -- what a client sees ------------------------------------------------------------------------

    def ask(self, tokens: Sequence[int], on_device: int = 0, salt: str = "") -> Request:
        """A new request.  `on_device`: tokens, in whole blocks, that vLLM's own prefix cache holds."""
        self._ids += 1
        request = Request(f"r{self._ids}", tuple(tokens), on_device, salt)
        self._live[request.id] = request
        self.planner.begin(request.id, request.tokens, [("salt", salt)] if salt else [])
        return request

    def serve(self, *prompts: Sequence[int]) -> list[Request]:
        """Ask all at once; every one is served to its end."""
        asked = [self.ask(prompt) for prompt in prompts]
        self.run()
        return asked

    def run(self) -> None:
        """Step until nobody waits for an answer."""
        self._until(lambda: not self._live)

    def settle(self) -> None:
        """Step until everything is written and every plan is reported; then the books must balance."""
        self._until(lambda: not self._live and not self.planner.busy)
        self.check()

    def clear(self, folder: Path, slots: int) -> None:
        """Forget everything, so that no restart over `folder` finds it again; what is under way, as soon as
        it has been reported."""
        self._erase = partial(erase, (folder,), capacity(slots), PAYLOAD, SCHEME.namespace, 0, 1)
        self._empty(self.store.clear())

    def wait_for_probes(self) -> None:
        """Until every look-up asked so far has been answered."""
        if self._probe:
            self._probe.wait()

    def abort(self, request: Request) -> None:
        """The client hung up.  Blocks under a load stay taken until the load has been reported."""
        if request.id in self._live and not request.aborted:
            request.aborted = True
            self.planner.end(request.id)
            if request.state != "loading":
                self._release(request)

    # -- one step, in vLLM's order -----------------------------------------------------------------

    def step(self) -> None:
        waiting = [r for r in self._live.values() if r.state == "waiting"]
        for request in waiting:
            self._admit(request)
        budget, scheduled = STEP_TOKENS, []
        running = [r for r in self._live.values() if r.state == "running"]
        for request in running:
            new = min(budget, len(request.tokens) - request.computed)
            if new:
                budget -= new
                scheduled.append(
                    Scheduled(request.id, request.tokens, request.computed, new, tuple(request.blocks))
                )
        plans = self.planner.step(scheduled)
        assert not self._owed & {plan.id for plan in plans}
        self._owed |= {plan.id for plan in plans}
        for plan in plans:
            if plan.kind == "load":
                self.mover.load(plan)
            elif plan.kind == "demote":
                self.mover.demote(plan)
        for item in scheduled:
            self._compute(self._live[item.req_id], item.new)
        self.mover.save([plan for plan in plans if plan.kind == "save"])
        self._hear(self.mover.poll())
        for request in running:
            if request.state == "running" and request.computed == len(request.tokens):
                self._finish(request)

    def _admit(self, request: Request) -> None:
        matched = self.planner.matched(request.id, request.tokens, request.on_device)
        needed = -(-len(request.tokens) // BLOCK)
        if matched is None or needed > len(self._free):
            return
        if matched:
            self.between()
        request.blocks = [self._free.pop() for _ in range(needed)]
        self._expect(_POISON, request.blocks)
        request.computed = request.on_device
        self._write(request, 0, request.on_device)
        request.promised = request.on_device + matched
        request.state = "loading" if matched else "running"
        if matched:
            self.planner.allocated(request.id, tuple(request.blocks), matched)

    def _compute(self, request: Request, new: int) -> None:
        self.verify(request)  # what it reads while computing
        self._write(request, request.computed, request.computed + new)
        request.computed += new

    def _hear(self, outcome: Outcome) -> None:
        assert outcome.verify_failures == 0
        for req_id in outcome.loaded:
            self._arrived(self._live[req_id], outcome.bad_blocks)
        for plan, kept in outcome.reports:
            assert plan in self._owed, f"plan {plan} was reported twice"
            self._owed.discard(plan)
            self.planner.report({plan: (1, kept)})
        self._empty(self.store.to_erase())
        self.store.check()

    def _arrived(self, request: Request, bad: set[int]) -> None:
        """The load is over: tokens before the first bad block are computed; with none of them, ask again."""
        assert request.state == "loading", f"{request.id} was reported twice"
        if request.aborted:
            self._release(request)
            return
        whole = request.blocks[: request.promised // BLOCK]
        good = next((i for i, block in enumerate(whole) if block in bad), len(whole)) * BLOCK
        request.computed = min(request.promised, good)
        request.loaded += max(0, request.computed - request.on_device)
        self.verify(request)
        request.state = "running"
        if not request.computed:
            self._give_back(request)
            request.state = "waiting"

    def _finish(self, request: Request) -> None:
        self.verify(request)
        self.planner.end(request.id)
        self.hits += request.loaded
        self.served += 1
        self._release(request)

    # -- proofs ------------------------------------------------------------------------------------

    def verify(self, request: Request) -> None:
        """Every computed token's bytes are what computing it writes, whoever wrote them."""
        at = _slots(request.blocks, 0, request.computed)
        got = self.pages.view(LAYERS, -1, TOKEN_BYTES)[:, at]
        same = torch.equal(got, truth(request.tokens, request.salt)[:, : request.computed])
        assert same, f"{request.id}: wrong bytes under {request.computed} computed tokens"

    def check(self) -> None:
        """Nothing is owed, leaked or written where it should not be."""
        assert not self._owed, f"never reported: {sorted(self._owed)}"
        assert not self.store.busy, "an open plan"
        self.store.check()
        self._expect(_POISON, self._free)

    def read_from(self, *tiers: str) -> int:
        """Bytes read from these tiers so far."""
        return sum(stats_of(self.tiers[tier].inner).bytes_read for tier in tiers)

    def close(self) -> None:
        """Stop as a worker does; what is under way is finished first."""
        self.mover.close()
        if self._probe:
            self._probe.close()

    # -- inside ------------------------------------------------------------------------------------

    def _until(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + _STUCK_SECONDS
        while not done():
            stuck = [(r.id, r.state, r.computed) for r in self._live.values()]
            assert time.monotonic() < until, f"stuck: {stuck}, owed {sorted(self._owed)}"
            self.step()
            if not any(r.state == "running" for r in self._live.values()):
                time.sleep(0.0005)

    def _empty(self, slots: list[int]) -> None:
        if slots:
            self._erase(slots)
            self.store.erased(slots)

    def _write(self, request: Request, start: int, end: int) -> None:
        at = _slots(request.blocks, start, end)
        self.pages.view(LAYERS, -1, TOKEN_BYTES)[:, at] = truth(request.tokens, request.salt)[:, start:end]

    def _expect(self, value: int, blocks: Sequence[int]) -> None:
        clean = bool((self.pages[:, list(blocks)] == value).all())
        assert clean, "somebody wrote into pages that nobody owns"

    def _give_back(self, request: Request) -> None:
        self.pages[:, request.blocks] = _POISON
        self._free += request.blocks
        request.blocks, request.computed = [], 0

    def _release(self, request: Request) -> None:
        self._give_back(request)
        request.state = "done"
        del self._live[request.id]


class _Probe:
    """Asks Redis on one thread, as the scheduler half does; an open breaker is asked but not waited for."""

    def __init__(self, tier: Breaker) -> None:
        self._tier, self._thread = tier, ThreadPoolExecutor(1, "probe")

    def ask(self, keys: Sequence[ChunkKey]) -> "Future[int] | None":
        broken = self._tier.open
        asked = self._thread.submit(self._prefix, keys[:1] if broken else keys)
        return None if broken else asked

    def _prefix(self, keys: Sequence[ChunkKey]) -> int:
        try:
            return self._tier.prefix([Ref(key) for key in keys])
        except CacheError:
            return -1

    def wait(self) -> None:
        self._thread.submit(int).result()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def _nothing_to_erase(slots: Sequence[int]) -> None:
    raise AssertionError("slots to erase before anything was cleared")


def _nobody(keys: Sequence[ChunkKey]) -> None:
    return None


def stats_of(tier: Tier) -> TierStats:
    """The counters of a tier, through whatever wraps it."""
    while not hasattr(tier, "stats"):
        tier = tier.inner
    return tier.stats


def disk_tier(folder: Path, slots: int) -> DiskTier:
    return DiskTier((folder,), capacity(slots), PAYLOAD, SCHEME.namespace, CHUNK, 0, 1)


def found(folder: Path, slots: int) -> dict[int, Want]:
    """What a restart finds, as the store wants it."""
    claims = scan((folder,), capacity(slots), PAYLOAD, SCHEME.namespace, 0, 1)
    return {
        slot: Want(
            info.key,
            ChunkKey(info.parent) if info.parent else NO_PARENT,
            ChunkKey(info.root),
            info.tokens // BLOCK,
        )
        for slot, info in claims.items()
    }


def capacity(slots: int) -> int:
    """disk_bytes for so many slots."""
    size = PAYLOAD
    while slots_in(size, PAYLOAD) < slots:
        size += PAYLOAD // 4
    return size


def redis_tier(url: str, timeout_ms: int = 1000, connections: int = 4) -> RedisTier:
    return RedisTier(
        url, MODEL, SCHEME.namespace, PAYLOAD, CHUNK, "uint8", "mini", 0, 1, "w0", 600, timeout_ms,
        connections=connections,
    )  # fmt: skip


def on_disk(
    folder: Path, slots: int = 24, *, wrap: Callable[[Tier], Tier] = lambda tier: tier, **kwargs: Any
) -> MiniEngine:
    """An engine over a disk tier; an existing folder is taken up again, as after a restart."""
    tier = disk_tier(folder, slots)
    return MiniEngine({DISK: wrap(tier)}, slots={DISK: slots}, restore=found(folder, slots), **kwargs)


def on_redis(url: str, *, timeout_ms: int = 1000, **kwargs: Any) -> MiniEngine:
    return MiniEngine({REDIS: redis_tier(url, timeout_ms)}, slots={REDIS: 500}, **kwargs)


def on_both(folder: Path, url: str, *, slots: int = 24, timeout_ms: int = 1000, **kwargs: Any) -> MiniEngine:
    tiers = {DISK: disk_tier(folder, slots), REDIS: redis_tier(url, timeout_ms)}
    return MiniEngine(tiers, slots={DISK: slots, REDIS: 500}, restore=found(folder, slots), **kwargs)


def prompt(n: int, chunks: int = 4, tail: int = 21) -> tuple[int, ...]:
    """Prompt n: its own tokens throughout, not a multiple of a chunk or block."""
    return tuple(n * 10_000 + i for i in range(chunks * CHUNK + tail))


@lru_cache(maxsize=512)
def truth(tokens: tuple[int, ...], salt: str = "") -> torch.Tensor:
    """uint8 [layers, tokens, token bytes]: what computing this prompt writes.  Salts differ in it, so that
    sharing between them would be seen."""
    state, rows = hashlib.sha256(salt.encode()), []
    for token in tokens:
        state.update(token.to_bytes(4, "little"))
        rows.append(hashlib.shake_128(state.digest()).digest(LAYERS * TOKEN_BYTES))
    flat = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    return flat.view(len(tokens), LAYERS, TOKEN_BYTES).transpose(0, 1).contiguous()


def _slots(blocks: Sequence[int], start: int, end: int) -> torch.Tensor:
    """Where tokens start … end - 1 lie in the flattened cache."""
    position = torch.arange(start, end)
    table = torch.tensor(blocks or [0])
    return table[position // BLOCK] * BLOCK + position % BLOCK


class Weather:
    """Bad days of a medium: it is slow (`seconds` a verb), it hangs (`gate` cleared), it fails (`down`)."""

    def __init__(self, inner: Tier) -> None:
        self.inner, self.name = inner, inner.name
        self.seconds, self.down, self.gate = 0.0, False, threading.Event()
        self.gate.set()

    def _suffer(self) -> Tier:
        self.gate.wait(_STUCK_SECONDS)
        time.sleep(self.seconds)
        if self.down:
            raise TierDown(f"{self.name} is down")
        return self.inner

    def prefix(self, refs: Sequence[Ref]) -> int:
        return self._suffer().prefix(refs)

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        return self._suffer().read(refs, into)

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        return self._suffer().write(refs, data)

    def close(self) -> None:
        self.inner.close()
