"""From a prompt's chunk keys to an order of workers: gather what is known, call the policy, write it down."""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cacheengine.errors import IndexDown
from cacheengine.index import NOTHING, Depths, IndexReader
from cacheengine.keys import ChunkKey, digest
from router.hearsay import Hearsay
from router.load import LoadBoard
from router.pending import PendingPrefixes
from router.placement import NoWorker, Placement
from router.policy import CACHE_BLIND, NO_HIT, POLICIES, Candidate, Choice, Hit, as_log
from router.popular import Forks
from router.registry import Registry
from router.ring import Ring
from router.worker import Worker

log = logging.getLogger(__name__)

DECISIONS = 1000
FALLBACK = "prefix_ring"  # what runs when the index cannot be asked

Holders = Mapping[tuple[str, int], Depths]


class Router:
    """REQUIRES: used from one event loop.

    `on_decision` hears every decision as it is written to `decisions` (the gateway's metrics listen there).
    """

    def __init__(
        self,
        registry: Registry,
        board: LoadBoard,
        index: IndexReader | None = None,
        policy: str = "predicted_ttft",
        clock: Callable[[], float] = time.monotonic,
        on_decision: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Raises KeyError for an unknown policy."""
        POLICIES[policy]
        self.registry, self.board, self.policy = registry, board, policy
        self._index, self._clock, self._on_decision = index, clock, on_decision
        self._pending, self._forks, self._hearsay = PendingPrefixes(clock), Forks(clock), Hearsay(clock)
        self._rings: dict[tuple[str, ...], Ring] = {}
        self._turn = 0
        self.decisions: deque[dict[str, Any]] = deque(maxlen=DECISIONS)

    async def place(
        self,
        model: str,
        keys: Sequence[ChunkKey],
        prompt_tokens: int,
        exclude: Collection[str] = (),
        affinity: bytes = b"",
        session: bytes = b"",
    ) -> list[Placement]:
        """Workers to try, best first.  `keys` are made with registry.scheme(model); `affinity` (say, the raw
        prompt's first bytes) steers the ring when there are none.  `session` is the caller's own name for the
        conversation, if it gave one.  Raises NoWorker."""
        started = self._clock()
        holders, index = await self._holders(model, keys)
        lookup = self._clock() - started
        # from here to the caller nothing awaits: two requests at once see each other
        workers = {w.id: w for w in self.registry.workers_for(model) if w.id not in exclude}
        if not workers:
            raise NoWorker(f"no worker serves {model!r} now")
        ring_key = self._ring_key(keys, affinity, session)
        candidates = self._candidates(workers, holders, keys, prompt_tokens, ring_key)
        ran = self.policy
        if self.policy not in CACHE_BLIND and index == "down":
            ran = FALLBACK
        order = POLICIES[ran](prompt_tokens, candidates, self._turn)
        placements = [self._placement(workers[c.candidate.worker], c, ran, index, keys) for c in order]
        self._pending.sent(keys, placements[0].worker.id)
        self._forks.passed(keys)
        self._note(model, prompt_tokens, len(keys), ran, index, lookup, candidates, placements)
        self._turn += 1
        return placements

    def _ring_key(self, keys: Sequence[ChunkKey], affinity: bytes, session: bytes) -> bytes:
        """A session keeps its place where that is the policy.  Elsewhere the prompt says more: a session's
        name is a guess about it, and steers the ring only when there are no keys."""
        if session and (self.policy == "session" or not keys):
            return digest(session)
        return self._forks.own(keys) if keys else digest(affinity)

    async def _holders(self, model: str, keys: Sequence[ChunkKey]) -> tuple[Holders, str]:
        """Who holds what, and whether the index was "up", "down" or "unused"."""
        scheme = self.registry.scheme(model)
        if self._index is None or scheme is None or not keys or self.policy in CACHE_BLIND:
            return {}, "unused"
        try:
            return await self._index.holders(scheme.namespace, keys), "up"
        except IndexDown as exc:
            log.debug("routing by ring: %s", exc)
            return {}, "down"

    def _candidates(
        self,
        workers: Mapping[str, Worker],
        holders: Holders,
        keys: Sequence[ChunkKey],
        prompt_tokens: int,
        ring_key: bytes,
    ) -> list[Candidate]:
        scheme = self.registry.scheme(next(iter(workers.values())).model)
        # blobs in Redis outlive whoever put them there: lives that are over still count
        shared = max((depths.shared for depths in holders.values()), default=0)
        sent_to, sent = self._pending.find(keys)
        rank = {worker_id: i for i, worker_id in enumerate(self._ring(workers).order(ring_key))}
        candidates = []
        others = self._others(workers)
        for worker in workers.values():
            hit, pending = NO_HIT, 0
            if scheme is not None and worker.scheme == scheme:
                held = holders.get((worker.id, worker.epoch), NOTHING)
                if worker.id == sent_to:
                    pending = max(0, sent - held.local) * scheme.chunk_tokens
                    held = held._replace(device=max(held.device, sent))
                if "shared" in worker.tiers or "redis" in worker.tiers:
                    held = held._replace(shared=shared)
                hit = _stretches(held, scheme.chunk_tokens, prompt_tokens)
            load = worker.load
            candidates.append(
                Candidate(
                    worker=worker.id,
                    ring=rank[worker.id],
                    inflight=self.board.inflight(worker.id),
                    running=load.running,
                    queued_tokens=self.board.prefilling(worker.id) + others[worker.id],
                    pending_tokens=pending,
                    prefill_rate=load.prefill_rate,
                    hit=hit,
                    token_bytes=worker.token_bytes,
                    bandwidth={"host": load.bw_host, "disk": load.bw_disk, "shared": load.bw_redis},
                )
            )
        return candidates

    def _others(self, workers: Mapping[str, Worker]) -> Mapping[str, float]:
        """Tokens that other gateways have queued on each worker."""
        heard = {
            w.id: self.board.queued_tokens(w.id, w.load.queued_tokens, w.load.beat_ms)
            - self.board.prefilling(w.id)
            for w in workers.values()
        }
        return self._hearsay.faded(heard, {w.id: w.load.beat_ms for w in workers.values()})

    def _ring(self, workers: Mapping[str, Worker]) -> Ring:
        members = tuple(sorted(workers))
        if (ring := self._rings.get(members)) is None:
            if len(self._rings) >= 16:  # memberships seen: models, and retries that exclude one
                self._rings.clear()
            ring = self._rings[members] = Ring(members)
        return ring

    def _placement(
        self, worker: Worker, choice: Choice, ran: str, index: str, keys: Sequence[ChunkKey]
    ) -> Placement:
        tokens = sum(choice.hit)
        if ran in CACHE_BLIND:
            reason = "policy"
        elif index == "down":
            reason = "index_down"
        elif not keys:
            reason = "no_keys"
        else:
            reason = "hit" if tokens else "cold"
        return Placement(
            worker=worker,
            expected_hit_tokens=tokens,
            hit_by_tier=choice.hit._asdict(),
            reason=reason,
            policy=ran,
            terms_ms={name: round(1000 * seconds, 3) for name, seconds in choice.terms.items()},
        )

    def _note(
        self,
        model: str,
        prompt_tokens: int,
        chunks: int,
        ran: str,
        index: str,
        lookup: float,
        candidates: Sequence[Candidate],
        placements: Sequence[Placement],
    ) -> None:
        first = placements[0]
        decision = {
            "at": time.time(),
            "model": model,
            "prompt_tokens": prompt_tokens,
            "chunks": chunks,
            "policy": self.policy,
            "ran": ran,
            "turn": self._turn,
            "index": index,
            "lookup_ms": round(1000 * lookup, 3),
            "candidates": [as_log(candidate) for candidate in candidates],
            "order": [placement.worker.id for placement in placements],
            "worker": first.worker.id,
            "reason": first.reason,
            "expected_hit_tokens": first.expected_hit_tokens,
            "terms_ms": dict(first.terms_ms),
        }
        self.decisions.append(decision)
        if self._on_decision is not None:
            self._on_decision(decision)


def _stretches(held: Depths, chunk_tokens: int, prompt_tokens: int) -> Hit:
    """Depths (from the front, per tier) → disjoint stretches in tokens: a faster tier serves first."""
    tokens, reached = [], 0
    for depth in held:
        end = max(reached, min(depth * chunk_tokens, prompt_tokens))
        tokens.append(end - reached)
        reached = end
    return Hit(*tokens)
