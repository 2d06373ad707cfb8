"""The engine-neutral half of a connector: tokens and block tables in, Plans out, reports settled.

Runs on the serving engine's scheduler thread.  Nothing here does I/O: what Redis holds is asked by a probe
on its own thread, and a request whose answer is not here yet is asked again in the next step.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from cacheengine.keys import ChunkKey, KeyChain, KeyScheme
from cacheengine.metrics import Tally
from cacheengine.plan import DISK, HOST, NO_PARENT, REDIS, SKIP, Plan, Report, Want
from cacheengine.store import Store

# Leading keys Redis holds, -1 when it could not say; None: the shared tier is off or broken now.
Probe = Callable[[Sequence[ChunkKey]], "Future[int] | None"]
_EWMA = 0.3
_MIN_MEASURED_TOKENS = 64


class Scheduled(NamedTuple):
    """One request's share of the step about to run."""

    req_id: str
    tokens: Sequence[int]  # all tokens known so far
    computed: int  # tokens whose KV is in the blocks before the step
    new: int  # tokens this step computes
    blocks: Sequence[int]


@dataclass(slots=True)
class _Request:
    chain: KeyChain
    prompt: int
    computed: int = 0
    running: bool = False
    probe: Future[int] | None = None
    probed_from: int = 0
    remote: frozenset[ChunkKey] = frozenset()
    hit: int = 0  # chunks promised at the last ask
    saved: int = 0
    barred: bool = False  # a load brought nothing: compute
    patience: float = 0.0  # until when to wait for Redis
    arrival: float = 0.0  # until when to wait for a chunk another plan is bringing


@dataclass(slots=True)
class _Words:
    """What the ranks have said of one leg so far."""

    ranks: int = 0
    kept: int = 1 << 60


@dataclass(slots=True)
class Rates:
    """Moving averages the router turns into seconds."""

    prefill: float = 0.0  # tokens/s
    read: dict[str, float] = field(default_factory=dict)  # tier → bytes/s

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= _MIN_MEASURED_TOKENS and seconds > 0:
            self.prefill = _blend(self.prefill, tokens / seconds)

    def observe_read(self, tier: str, size: int, seconds: float) -> None:
        if size and seconds > 0:
            self.read[tier] = _blend(self.read.get(tier, 0.0), size / seconds)


def _blend(old: float, new: float) -> float:
    return new if not old else old + _EWMA * (new - old)


class Planner:
    """`ranks` is how many words a leg needs before it counts."""

    def __init__(
        self,
        scheme: KeyScheme,
        store: Store,
        block_tokens: int,
        ranks: int,
        probe: Probe,
        patience_seconds: float,
        tally: Tally,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.tally, self.rates = store, tally, Rates()
        self._scheme, self._n = scheme, scheme.chunk_tokens
        self._block, self._per_chunk = block_tokens, scheme.chunk_tokens // block_tokens
        self._ranks, self._probe, self._patience, self._clock = ranks, probe, patience_seconds, clock
        self._requests: dict[str, _Request] = {}
        self._plans: dict[int, Plan] = {}
        self._words: dict[tuple[int, str], _Words] = {}
        self._loads: list[Plan] = []
        self._totals = {"lookup_tokens": 0.0, **{f"hit_tokens_{tier}": 0.0 for tier in (HOST, DISK, REDIS)}}

    # -- a request's life --------------------------------------------------------------------------

    def begin(self, req_id: str, tokens: Sequence[int], tags: Sequence[tuple[str, str]]) -> None:
        """A new request: key it once, and ask Redis early about what is not here."""
        request = _Request(KeyChain(self._scheme, tags), len(tokens))
        request.chain.extend(tokens)
        self.tally.add("cairn_engine_lookup_tokens_total", len(tokens))
        self._totals["lookup_tokens"] += len(tokens)
        self._requests[req_id] = request
        self._ask(request, self._usable(tokens))

    def matched(self, req_id: str, tokens: Sequence[int], computed: int) -> int | None:
        """Tokens loadable beyond `computed` (a multiple of the block size), 0 for none, None for "ask
        again": Redis has not answered yet, or another plan is just bringing the next chunk."""
        request = self._requests.get(req_id)
        if request is None or request.barred:
            return 0
        request.chain.extend(tokens)
        keys = request.chain.keys[: self._usable(tokens)]
        if computed >= len(keys) * self._n:
            request.hit = 0
            return 0
        if self._must_wait(request, keys):
            return None
        request.hit = self._depth(keys, request.remote)
        external = request.hit * self._n - computed
        return max(0, external)

    def allocated(self, req_id: str, blocks: Sequence[int], external: int) -> None:
        """The engine gave the request blocks; load what was promised into them."""
        request = self._requests.get(req_id)
        if request is None or external <= 0:
            return
        start = request.hit * self._n - external
        first, skip = start // self._n, start % self._n // self._block
        keys, per = request.chain.keys, self._per_chunk
        wants = []
        for i in range(first, request.hit):
            ids = tuple(blocks[i * per : (i + 1) * per])
            if i == first and skip:
                ids = (SKIP,) * skip + ids[skip:]
            wants.append(self._want(keys, i, ids))
        seen = [self._want(keys, i, ()) for i in range(request.hit)]
        self.store.learn([w for w in seen if w.key in request.remote], REDIS)
        plan = self.store.begin_load(req_id, wants, request.remote)
        request.probe, request.remote = None, frozenset()
        request.computed = request.hit * self._n
        self._plans[plan.id] = plan
        self._loads.append(plan)

    def step(self, scheduled: Sequence[Scheduled]) -> list[Plan]:
        """The plans of the step about to run: loads just promised, chunks it completes."""
        plans, self._loads = self._loads, []
        for item in scheduled:
            request = self._requests.get(item.req_id)
            if request is None:
                continue
            request.running, request.computed = True, item.computed + item.new
            request.chain.extend(item.tokens)
            done = min(request.computed // self._n, len(request.chain.keys))
            if done <= request.saved:
                continue
            request.saved = done
            keys, per = request.chain.keys, self._per_chunk
            wants = [self._want(keys, i, tuple(item.blocks[i * per : (i + 1) * per])) for i in range(done)]
            plan = self.store.begin_save(item.req_id, wants)
            if plan is not None:
                self._plans[plan.id] = plan
                plans.append(plan)
        return plans

    def end(self, req_id: str) -> None:
        self._requests.pop(req_id, None)

    # -- reports -----------------------------------------------------------------------------------

    def report(self, words: dict[tuple[int, str], tuple[int, int]]) -> None:
        """(plan, leg) → (ranks that spoke, least kept).  A leg settles when every rank has spoken."""
        for (plan_id, leg), (ranks, kept) in sorted(words.items(), key=lambda item: item[0][1] != HOST):
            heard = self._words.setdefault((plan_id, leg), _Words())
            heard.ranks += ranks
            heard.kept = min(heard.kept, kept)
            if heard.ranks >= self._ranks:
                del self._words[plan_id, leg]
                self._settle(Report(plan_id, leg, heard.kept))

    def _settle(self, report: Report) -> None:
        plan = self._plans[report.plan]
        self.store.settle(*report)
        lost = len(plan.moves) - report.kept
        if plan.kind == "load":
            if not report.kept and (request := self._requests.get(plan.req_id)):
                request.barred = True  # the engine asks again; promise nothing twice
            for move in plan.moves[: report.kept]:
                fresh = sum(block != SKIP for block in move.blocks)
                self.tally.add("cairn_engine_hit_tokens_total", fresh * self._block, move.tier)
                self._totals[f"hit_tokens_{move.tier}"] += fresh * self._block
            self.tally.add("cairn_engine_failed_tokens_total", lost * self._n)
        else:
            self.tally.add("cairn_engine_saved_chunks_total", report.kept, report.leg)
            self.tally.add("cairn_engine_dropped_chunks_total", lost, report.leg)
        if not self.store.is_open(plan.id):
            del self._plans[plan.id]

    # -- load, for the router ----------------------------------------------------------------------

    def load(self) -> dict[str, float]:
        requests = list(self._requests.values())
        return {
            "running": float(sum(r.running for r in requests)),
            "waiting": float(sum(not r.running for r in requests)),
            "queued_tokens": float(sum(max(0, r.prompt - r.computed) for r in requests)),
            "prefill_rate": self.rates.prefill,
            **{f"bw_{tier}": rate for tier, rate in list(self.rates.read.items())},
        }

    def sources(self, req_id: str) -> dict[str, int]:
        """Tokens the load just planned for this request takes from each tier."""
        tokens: dict[str, int] = {}
        for plan in self._loads:
            for move in plan.moves if plan.req_id == req_id else ():
                fresh = sum(block != SKIP for block in move.blocks) * self._block
                tokens[move.tier] = tokens.get(move.tier, 0) + fresh
        return tokens

    def totals(self) -> dict[str, float]:
        """Counts since start, for the worker's heartbeat."""
        return dict(self._totals)

    # -- inside ------------------------------------------------------------------------------------

    def _usable(self, tokens: Sequence[int]) -> int:
        """Chunks that may be loaded: at least one token is left to compute, for its logits."""
        return (len(tokens) - 1) // self._n

    def _want(self, keys: Sequence[ChunkKey], i: int, blocks: tuple[int, ...]) -> Want:
        return Want(keys[i], keys[i - 1] if i else NO_PARENT, keys[0], blocks)

    def _depth(self, keys: Sequence[ChunkKey], remote: frozenset[ChunkKey]) -> int:
        here = self.store.tier_of
        return next((i for i, key in enumerate(keys) if not here(key) and key not in remote), len(keys))

    def _ask(self, request: _Request, usable: int) -> None:
        """Start a Redis look-up for what follows the local prefix."""
        keys = request.chain.keys[:usable]
        start = self._depth(keys, frozenset())
        if start < len(keys):
            request.probe, request.probed_from = self._probe(keys[start:]), start
            request.patience = self._clock() + self._patience

    def _must_wait(self, request: _Request, keys: Sequence[ChunkKey]) -> bool:
        local = self._depth(keys, request.remote)
        now = self._clock()
        if any(self.store.arriving(key) for key in keys[: local + 1]):  # one read serves all who ask
            request.arrival = request.arrival or now + self._patience
            return now < request.arrival
        if request.probe is None or local == len(keys):
            return False
        if not request.probe.done():
            if now < request.patience:
                return True
            self.tally.add("cairn_engine_probe_timeouts_total", 1)
        else:
            start, found = request.probed_from, request.probe.result()
            probed = keys[start:]
            request.remote = frozenset(probed[: max(found, 0)])
            for key in probed[found : found + 1] if found >= 0 else ():
                self.store.unlearn(key, REDIS)
        request.probe = None
        return False
