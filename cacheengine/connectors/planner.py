"""The engine-neutral half of a connector: tokens and block tables in, Plans out, reports settled.

Runs on the serving engine's scheduler thread.  Nothing here does I/O: what Redis holds is asked by a probe
on its own thread, and a request whose answer is not here within a moment is asked again in the next step.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from cacheengine.connectors.demoter import Demoter
from cacheengine.connectors.rates import Loading, Rates
from cacheengine.keys import ChunkKey, KeyChain, KeyScheme
from cacheengine.metrics import Tally
from cacheengine.plan import DISK, HOST, NO_PARENT, REDIS, SKIP, Move, Plan, Want
from cacheengine.store import Store

# Leading keys Redis holds, -1 when it could not say; None: the shared tier is off or broken now.
Probe = Callable[[Sequence[ChunkKey]], "Future[int] | None"]

GRACE_SECONDS = 0.002  # in all that a step waits for Redis: a whole step of waiting costs a request far more


class Scheduled(NamedTuple):
    """One request's share of the step about to run."""

    req_id: str
    tokens: Sequence[int]  # all tokens known so far
    computed: int  # tokens whose KV is in the blocks before the step
    new: int  # tokens this step computes
    blocks: Sequence[int]


class Geometry(NamedTuple):
    """Sizes of one worker: a chunk in tokens and in bytes of one rank, a block in tokens, how many ranks."""

    chunk_tokens: int
    chunk_bytes: int
    block_tokens: int
    ranks: int


class _Piece(NamedTuple):
    """The chunk a promise ends with, of which only `used` of its `size` blocks are wanted: a tail, or a full
    chunk that the prompt's end leaves no room for."""

    key: ChunkKey
    size: int
    used: int


@dataclass(slots=True)
class _Request:
    chain: KeyChain
    prompt: int
    tenant: str
    computed: int = 0
    found: int = 0  # tokens held here when it came
    device: int = 0  # tokens the engine had itself at the last ask
    running: bool = False
    probe: Future[int] | None = None
    probed: Sequence[ChunkKey] = ()
    remote: frozenset[ChunkKey] = frozenset()
    hit: int = 0  # full chunks promised at the last ask
    end: _Piece | None = None  # and what follows them
    declined: dict[str, int] = field(default_factory=dict)  # tokens by tier that are quicker computed
    saved: int = 0
    tail_saved: bool = False
    barred: bool = False  # a load brought nothing: compute
    graced: bool = False  # a step has waited a moment for its probe
    patience: float = 0.0  # until when to wait for Redis
    arrival: float = 0.0  # until when to wait for a chunk another plan is bringing


@dataclass(slots=True)
class _Words:
    """What the ranks have said of a plan so far."""

    ranks: int = 0
    kept: int = 1 << 60


class Planner:
    """REQUIRES the block size to divide the chunk size."""

    def __init__(
        self,
        scheme: KeyScheme,
        geometry: Geometry,
        store: Store,
        demoter: Demoter,
        probe: Probe,
        patience_seconds: float,
        tally: Tally,
        clock: Callable[[], float] = time.monotonic,
        loading: Loading = "quicker",
    ) -> None:
        self.store, self.tally, self.rates = store, tally, Rates(clock, loading)
        self._scheme, self._geometry, self._demoter = scheme, geometry, demoter
        self._n, self._block = geometry.chunk_tokens, geometry.block_tokens
        self._per_chunk = self._n // self._block
        self._probe, self._patience, self._clock = probe, patience_seconds, clock
        self._requests: dict[str, _Request] = {}
        self._plans: dict[int, Plan] = {}
        self._words: dict[int, _Words] = {}
        self._loads: list[Plan] = []
        self._grace = GRACE_SECONDS  # what is left of it in this step
        tiers = ("device", HOST, DISK, REDIS)
        self._totals = {"lookup_tokens": 0.0, **{f"hit_tokens_{tier}": 0.0 for tier in tiers}}

    # -- a request's life --------------------------------------------------------------------------

    def begin(self, req_id: str, tokens: Sequence[int], tags: Sequence[tuple[str, str]]) -> None:
        """A new request: key it once, and ask Redis early about what is not here."""
        request = _Request(KeyChain(self._scheme, tags), len(tokens), dict(tags).get("salt", ""))
        request.chain.extend(tokens)
        self.tally.add("cairn_engine_lookup_tokens_total", len(tokens))
        self._totals["lookup_tokens"] += len(tokens)
        self._requests[req_id] = request
        self._ask(request, tokens)

    def matched(self, req_id: str, tokens: Sequence[int], computed: int) -> int | None:
        """Tokens loadable beyond `computed` (a multiple of the block size), 0 for none, None for "ask
        again": Redis has not answered yet, or another plan is just bringing the next chunk."""
        request = self._requests.get(req_id)
        if request is None or request.barred:
            return 0
        request.device = computed
        request.chain.extend(tokens)
        usable = self._usable(tokens)
        keys = request.chain.keys[: usable // self._per_chunk]
        if computed >= usable * self._block:
            return 0
        held = self.store.depth(keys, request.remote)
        if self._must_wait(request, keys, held):
            return None
        if request.remote:
            held = self.store.depth(keys, request.remote)
        request.hit = self._worth(request, keys, held, computed // self._n)
        request.end = self._ending(request, tokens, usable) if request.hit == held else None
        return max(0, self._promised(request) - computed)

    def allocated(self, req_id: str, blocks: Sequence[int], external: int) -> None:
        """The engine gave the request blocks; load what was promised into them."""
        request = self._requests.get(req_id)
        if request is None or external <= 0:
            return
        per, end = self._per_chunk, request.end
        first = (self._promised(request) - external) // self._block  # the device holds the blocks before it
        wants = self._wants(request, first // per, request.hit, _but(blocks, first))
        if end is not None:
            ids = _but(blocks[request.hit * per : request.hit * per + end.used], first - request.hit * per)
            ids += (SKIP,) * (end.size - end.used)
            wants.append(self._tail(request, request.hit, end.key, ids))
        if remote := request.remote:  # what the device holds already is worth knowing too
            before = self._wants(request, 0, first // per, ())
            self.store.learn([want for want in (*before, *wants) if want.key in remote], REDIS)
        plan = self.store.begin_load(req_id, wants, remote)
        request.probe, request.remote = None, frozenset()
        request.computed = self._promised(request)
        self._plans[plan.id] = plan
        self._loads.append(plan)

    def step(self, scheduled: Sequence[Scheduled]) -> list[Plan]:
        """The plans of the step about to run: loads just promised, chunks it completes, and what is to be
        written below."""
        plans, self._loads, self._grace = self._loads, [], GRACE_SECONDS
        for item in scheduled:
            request = self._requests.get(item.req_id)
            if request is not None and (plan := self._advance(request, item)):
                plans.append(plan)
        prefill = any(item.new > 1 for item in scheduled)
        below = self._demoter.plans("prefill" if prefill else "decode" if scheduled else "nothing")
        for plan in (*plans, *below):
            self._plans[plan.id] = plan
        return plans + below

    def _advance(self, request: _Request, item: Scheduled) -> Plan | None:
        """Save what this step completes."""
        per, store = self._per_chunk, self.store
        request.chain.extend(item.tokens)
        if not request.running:
            self._starts(request)
        request.computed = item.computed + item.new
        keys = request.chain.keys
        done = min(request.computed // self._n, len(keys))
        self._skip_saved(request, done)
        wants = self._wants(request, request.saved, done, item.blocks)
        full, rest = divmod(request.prompt // self._block, per)
        if request.computed >= request.prompt and not request.tail_saved:
            request.tail_saved = True
            if rest:
                key = request.chain.tail(item.tokens, full, rest * self._block)
                ids = tuple(item.blocks[full * per : full * per + rest])
                wants.append(self._tail(request, full, key, ids))
        if not wants:
            return None
        plan = store.begin_save(item.req_id, wants, spare=set(keys))
        self._skip_saved(request, done)
        return plan

    def _skip_saved(self, request: _Request, done: int) -> None:
        """Past what is here or on its way."""
        store, keys = self.store, request.chain.keys
        while request.saved < done and (
            store.holds(keys[request.saved]) or store.expected(keys[request.saved])
        ):
            request.saved += 1

    def _starts(self, request: _Request) -> None:
        """First time a request runs: what it uses has proved useful."""
        request.running = True
        self._totals["hit_tokens_device"] += request.device
        held = self.store.depth(request.chain.keys)
        if request.end is not None and request.hit == held:
            self.store.use(request.end.key)
        elif held:
            self.store.use(request.chain.keys[held - 1])
        for tier, tokens in request.declined.items():
            self.tally.add("cairn_engine_declined_tokens_total", tokens, tier)

    def keys(self, req_id: str) -> Sequence[ChunkKey]:
        """The keys of a live request's full chunks."""
        return self._requests[req_id].chain.keys

    def end(self, req_id: str) -> None:
        self._requests.pop(req_id, None)

    # -- reports -----------------------------------------------------------------------------------

    def report(self, words: dict[int, tuple[int, int]]) -> None:
        """plan → (ranks that spoke, least kept).  A plan settles when every rank has spoken."""
        for plan_id, (ranks, kept) in words.items():
            heard = self._words.setdefault(plan_id, _Words())
            heard.ranks += ranks
            heard.kept = min(heard.kept, kept)
            if heard.ranks >= self._geometry.ranks:
                del self._words[plan_id]
                self._settle(self._plans.pop(plan_id), heard.kept)

    def _settle(self, plan: Plan, kept: int) -> None:
        self.store.settle(plan.id, kept)
        if plan.kind == "load":
            if not kept and (request := self._requests.get(plan.req_id)):
                request.barred = True  # the engine asks again; promise nothing twice
            for tier, tokens in self._tokens(plan.moves[:kept]).items():
                self.tally.add("cairn_engine_hit_tokens_total", tokens, tier)
                self._totals[f"hit_tokens_{tier}"] += tokens
            lost = sum(self._tokens(plan.moves[kept:]).values())
            self.tally.add("cairn_engine_failed_tokens_total", lost)
            return
        tier = plan.moves[0].tier
        self.tally.add("cairn_engine_saved_chunks_total", kept, tier)
        self.tally.add("cairn_engine_dropped_chunks_total", len(plan.moves) - kept, tier)
        if plan.kind == "demote":
            self._demoter.settled(plan)

    # -- load, for the router ----------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Reports are out, or there is something to write in an idle step."""
        return self.store.busy or self._demoter.pending

    def load(self) -> dict[str, float]:
        requests = list(self._requests.values())
        return {
            "running": float(sum(r.running for r in requests)),
            "waiting": float(sum(not r.running for r in requests)),
            "queued_tokens": float(sum(max(0, r.prompt - max(r.computed, r.found)) for r in requests)),
            "prefill_rate": self.rates.prefill,
            **{f"bw_{tier}": rate for tier, rate in list(self.rates.read.items())},
        }

    def sources(self, req_id: str) -> dict[str, int]:
        """Tokens the load just planned for this request takes from each tier."""
        return self._tokens([move for plan in self._loads if plan.req_id == req_id for move in plan.moves])

    def totals(self) -> dict[str, float]:
        """Counts since start, for the worker's heartbeat."""
        return dict(self._totals)

    # -- inside ------------------------------------------------------------------------------------

    def _tokens(self, moves: Sequence[Move]) -> dict[str, int]:
        """What moves bring, by the tier it comes from."""
        tokens: dict[str, int] = {}
        for move in moves:
            fresh = (len(move.blocks) - move.blocks.count(SKIP)) * self._block
            tokens[move.tier] = tokens.get(move.tier, 0) + fresh
        return tokens

    def _usable(self, tokens: Sequence[int]) -> int:
        """Blocks that may be loaded: at least one token is left to compute, for its logits."""
        return (len(tokens) - 1) // self._block

    def _promised(self, request: _Request) -> int:
        used = request.end.used if request.end else 0
        return (request.hit * self._per_chunk + used) * self._block

    def _wants(self, request: _Request, start: int, stop: int, blocks: Sequence[int]) -> list[Want]:
        """Full chunks `start` to `stop`, with their shares of all the request's blocks."""
        keys, per, tenant = request.chain.keys, self._per_chunk, request.tenant
        parents = [NO_PARENT, *keys]
        return [
            Want(keys[i], parents[i], keys[0], per, tuple(blocks[i * per : (i + 1) * per]), tenant)
            for i in range(start, stop)
        ]

    def _tail(self, request: _Request, i: int, key: ChunkKey, blocks: tuple[int, ...]) -> Want:
        """The chunk behind the first `i`, which need not be a full one."""
        keys = request.chain.keys
        parent, root = (keys[i - 1], keys[0]) if i else (NO_PARENT, key)
        return Want(key, parent, root, len(blocks), blocks, request.tenant)

    def _ending(self, request: _Request, tokens: Sequence[int], usable: int) -> _Piece | None:
        """What is here of the chunk behind the promised ones: a full one the prompt fills to its very end,
        else the longest tail somebody left."""
        at, per, keys = request.hit, self._per_chunk, request.chain.keys
        room = usable - at * per
        if 0 < room < per and at < len(keys) and self._here(request, keys[at]):
            return _Piece(keys[at], per, room)
        for size in range(min(per - 1, len(tokens) // self._block - at * per), 0, -1):
            key = request.chain.tail(tokens, at, size * self._block)
            if self._here(request, key):
                return _Piece(key, size, min(size, room)) if room > 0 else None
        return None

    def _here(self, request: _Request, key: ChunkKey) -> bool:
        return self.store.tier_of(key) is not None or key in request.remote

    def _worth(self, request: _Request, keys: Sequence[ChunkKey], held: int, first: int) -> int:
        """How many of the `held` leading chunks to load.  A prefix is loaded from the front and can stop
        anywhere: where a tier is slower than computing, it stops before it, unless what lies behind is worth
        the detour."""
        request.declined = {}
        size = self._geometry.chunk_bytes
        gains = {tier: self.rates.gain(tier, size, self._n) for tier in (HOST, DISK, REDIS)}
        if min(gains.values()) >= 0:
            return held
        tiers = [self.store.tier_of(key) or REDIS for key in keys[first:held]]
        balance = best = 0.0
        stop = first
        for i, tier in enumerate(tiers, first + 1):
            balance += gains[tier]
            if balance >= best:
                best, stop = balance, i
        for tier in tiers[stop - first :]:
            request.declined[tier] = request.declined.get(tier, 0) + self._n
        return stop

    def _ask(self, request: _Request, tokens: Sequence[int]) -> None:
        """Start a Redis look-up for what follows the local prefix."""
        usable, per = self._usable(tokens), self._per_chunk
        keys = request.chain.keys[: usable // per]
        start = self.store.depth(keys)
        request.found = start * self._n
        asked = keys[start:]
        blocks = len(tokens) // self._block
        if usable % per and blocks % per:
            asked.append(request.chain.tail(tokens, usable // per, blocks % per * self._block))
        if asked and (probe := self._probe(asked)):
            request.probe, request.probed = probe, asked
            request.patience = self._clock() + self._patience

    def _must_wait(self, request: _Request, keys: Sequence[ChunkKey], held: int) -> bool:
        now = self._clock()
        if any(map(self.store.arriving, keys[: held + 1])):  # one read serves all who ask
            request.arrival = request.arrival or now + self._patience
            return now < request.arrival
        if request.probe is None or (keys and held == len(keys)):  # a tail is not worth waiting for
            return False
        if self._grace > 0 and not request.graced and not request.probe.done():
            request.graced = True  # once: a Redis that is not quick must not slow every further step
            began = time.perf_counter()
            wait([request.probe], self._grace)
            self._grace -= time.perf_counter() - began
        if not request.probe.done():
            if now < request.patience:
                return True
            self.tally.add("cairn_engine_probe_timeouts_total", 1)
        else:
            found = request.probe.result()
            request.remote = frozenset(request.probed[: max(found, 0)])
            for key in request.probed[found : found + 1] if found >= 0 else ():
                self.store.unlearn(key, REDIS)
        request.probe = None
        return False


def _but(blocks: Sequence[int], held: int) -> tuple[int, ...]:
    """These blocks without the first `held`, which the device has."""
    if held <= 0:
        return tuple(blocks)
    return (SKIP,) * min(held, len(blocks)) + tuple(blocks[held:])
