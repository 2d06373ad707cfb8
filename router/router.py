"""From a prompt's chunk keys to an order of workers: gather what is known, call the policy, write it down."""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cacheengine.errors import IndexDown
from cacheengine.index_reader import IndexReader
from cacheengine.keys import ChunkKey, KeyScheme
from router.decision import Decision
from router.load import LoadBoard
from router.placement import NoWorker, Placement, Placements
from router.policy import (
    CACHE_BLIND,
    DEFAULT_RATE,
    NO_HIT,
    POLICIES,
    SESSION,
    SLOWEST,
    Candidate,
    Choice,
    Hit,
    cost,
    decide,
)
from router.registry import Registry
from router.survey import Holders, Question, Survey
from router.trust import Trust
from router.worker import Worker

log = logging.getLogger(__name__)

DECISIONS = 1000  # kept, and fewer in a large fleet:
MAX_CANDIDATES = 64_000  # in all of them, about 50 MB
FALLBACK = "prefix_ring"  # what runs when the index cannot be asked


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
        on_decision: Callable[[Decision], None] | None = None,
        *,
        shadow: str = "",
        trust: Trust | None = None,
        out: Callable[[Sequence[Worker]], Collection[str]] = lambda ready: (),
    ) -> None:
        """`shadow` is a policy that is scored beside the real one and never used.  `out` names those of a
        model's ready workers who should get nothing now, never all.  Raises KeyError for an unknown
        policy."""
        for name in filter(None, (policy, shadow)):
            POLICIES[name]
        self.registry, self.board, self.policy, self.shadow = registry, board, policy, shadow
        self.trust = trust or Trust(clock)
        self._index, self._clock, self._on_decision, self._out = index, clock, on_decision, out
        self._survey = Survey(board, self.trust, clock)
        self._turn = 0
        self.decisions: deque[Decision] = deque()
        self._kept = 0  # candidates in them

    async def place(
        self,
        model: str,
        keys: Sequence[ChunkKey],
        prompt_tokens: int,
        exclude: Collection[str] = (),
        affinity: bytes = b"",
        session: bytes = b"",
    ) -> Placements:
        """Workers to try, best first; Question says what is asked.  Raises NoWorker."""
        asked = Question(model, keys, prompt_tokens, exclude, affinity, session)
        started = self._clock()
        holders, index = await self._holders(asked)
        lookup = self._clock() - started
        # from here to the caller nothing awaits: two requests at once see each other
        decision, placements = self._weigh(asked, holders, index, lookup)
        self._survey.sent(asked, decision.worker)
        decision.prefixes = self._survey.prefixes(asked, self.registry.scheme(asked.model))
        self._note(decision)
        self._turn += 1
        return placements

    async def explain(
        self,
        model: str,
        keys: Sequence[ChunkKey],
        prompt_tokens: int,
        affinity: bytes = b"",
        session: bytes = b"",
    ) -> dict[str, Any]:
        """What place() would do now and why, in plain types, without doing it.  Raises NoWorker."""
        asked = Question(model, keys, prompt_tokens, (), affinity, session)
        started = self._clock()
        holders, index = await self._holders(asked)
        lookup = self._clock() - started
        decision, placements = self._weigh(asked, holders, index, lookup, dry=True)
        decision.prefixes = self._survey.prefixes(asked, self.registry.scheme(asked.model))
        rows = []
        for choice, placement in zip(decision.choices, placements, strict=True):
            rows.append(
                {
                    "worker": placement.worker.id,
                    "reason": placement.reason,
                    "terms_ms": dict(placement.terms_ms),
                    "total_ms": round(1000 * choice.seconds, 3),
                    "expected_hit_tokens": placement.expected_hit_tokens,
                    "hit_by_tier": dict(placement.hit_by_tier),
                    "claimed_by_index": placement.claimed._asdict(),
                    "trust": self.trust.describe(placement.worker),
                    "ring": choice.candidate.ring,
                    "inflight": choice.candidate.inflight,
                    "queued_tokens": choice.candidate.queued_tokens,
                    "held_back": choice.candidate.held_back,
                }
            )
        return {**decision, "workers": rows}

    def learn(self, placement: Placement, prompt_tokens: int, cached_tokens: int) -> None:
        """The worker answered, and says how many prompt tokens it did not have to compute."""
        worker = placement.worker
        known = self.registry.find(worker.id)
        if known is None or known.boot_id != worker.boot_id:
            return  # it left meanwhile, or is another process now
        claimed = any(placement.claimed)
        local, shared = _loadable(worker, placement.claimed, prompt_tokens) if claimed else (0, 0)
        self.trust.heard(worker, "local", local, cached_tokens)
        if cached_tokens >= local:  # or the shared part was out of reach
            self.trust.heard(worker, "shared", shared, cached_tokens - local)
        if (decision := self.decision(placement.decision)) is not None:
            decision.actual_hit_tokens = cached_tokens

    def spoke(self, placement: Placement, seconds: float) -> None:
        """This placement's worker sent its first byte so long after the request came."""
        if (decision := self.decision(placement.decision)) is not None:
            decision.answered_by, decision.ttft_ms = placement.worker.id, round(1000 * seconds, 3)

    def decision(self, turn: int) -> Decision | None:
        """The line of the log with this number; None when it is no longer (or not yet) there."""
        age = self._turn - turn
        return self.decisions[-age] if 0 < age <= len(self.decisions) else None

    async def _holders(self, asked: Question) -> tuple[Holders, str]:
        """Who holds what, and whether the index was "up", "down" or "unused"."""
        scheme = self.registry.scheme(asked.model)
        if not asked.keys or self._index is None or scheme is None or self._indifferent():
            return {}, "unused"
        try:
            return await self._index.holders(scheme.namespace, asked.keys), "up"
        except IndexDown as exc:
            log.debug("routing by ring: %s", exc)
            return {}, "down"

    def _indifferent(self) -> bool:
        """No policy here looks at the cache."""
        return self.policy in CACHE_BLIND and (not self.shadow or self.shadow in CACHE_BLIND)

    def _weigh(
        self, asked: Question, holders: Holders, index: str, lookup: float, dry: bool = False
    ) -> tuple[Decision, Placements]:
        """One prompt in front of the fleet as it is now.  `dry` changes nothing that a later decision sees.
        Raises NoWorker."""
        ready = self.registry.workers_for(asked.model)
        out = {*asked.exclude, *self._out(ready)}
        workers = {worker.id: worker for worker in ready if worker.id not in out}
        if not workers:
            raise NoWorker(f"no worker serves {asked.model!r} now")
        scheme = self.registry.scheme(asked.model)
        by_session = self.policy == SESSION
        candidates, claims = self._survey.candidates(asked, workers, scheme, holders, by_session, dry)
        ran = self._runs(self.policy, index)
        order = decide(ran, asked.tokens, candidates, self._turn)
        keyed, turn = bool(asked.keys), self._turn

        def placement(choice: Choice) -> Placement:
            worker = workers[choice.candidate.worker]
            return Placement(
                worker=worker,
                expected_hit_tokens=sum(choice.hit),
                hit_by_tier=choice.hit._asdict(),
                reason=_reason(choice, ran, index, keyed),
                policy=ran,
                terms_ms=choice.terms_ms,
                claimed=claims.get(worker.id, NO_HIT),
                decision=turn,
            )

        decision = Decision(
            model=asked.model,
            prompt_tokens=asked.tokens,
            chunks=len(asked.keys),
            policy=self.policy,
            ran=ran,
            turn=turn,
            index=index,
            blind=self._blind(index, keyed, scheme, claims, candidates),
            lookup=lookup,
            given=candidates,
            choices=order,
            reason=_reason(order[0], ran, index, keyed),
            claimed=claims.get(order[0].candidate.worker, NO_HIT),
            shadow=self._shadowed(asked, workers, candidates, index, order[0]),
        )
        return decision, Placements(order, placement)

    def _runs(self, policy: str, index: str) -> str:
        return FALLBACK if index == "down" and policy not in CACHE_BLIND else policy

    def _blind(
        self,
        index: str,
        keyed: bool,
        scheme: KeyScheme | None,
        claims: Mapping[str, Hit],
        candidates: Sequence[Candidate],
    ) -> str:
        """Why this decision was made without the index; "" where it was not."""
        if self.policy in CACHE_BLIND:
            return "policy"
        if index == "down":
            return "index_down"
        if self._index is None:
            return "no_index"
        if scheme is None:
            return "no_scheme"
        if not keyed:
            return "no_keys"
        claimed, believed = any(map(any, claims.values())), any(any(c.hit) for c in candidates)
        return "stale" if claimed and not believed else ""

    def _shadowed(
        self,
        asked: Question,
        workers: Mapping[str, Worker],
        candidates: list[Candidate],
        index: str,
        used: Choice,
    ) -> dict[str, Any] | None:
        if not self.shadow:
            return None
        by_session = self.shadow == SESSION
        if asked.session and by_session != (self.policy == SESSION):
            candidates = self._survey.turned(asked, workers, candidates, by_session)
        ran = self._runs(self.shadow, index)
        other = decide(ran, asked.tokens, candidates, self._turn)[0]
        return {
            "policy": self.shadow,
            "ran": ran,
            "worker": other.candidate.worker,
            "differs": other.candidate.worker != used.candidate.worker,
            "predicted_ms": round(1000 * other.seconds, 3),
        }

    def _note(self, decision: Decision) -> None:
        self.decisions.append(decision)
        self._kept += len(decision.given)
        while self._kept > MAX_CANDIDATES or len(self.decisions) > DECISIONS:
            self._kept -= len(self.decisions.popleft().given)
        if self._on_decision is not None:
            self._on_decision(decision)


def _reason(choice: Choice, ran: str, index: str, keyed: bool) -> str:
    if ran in CACHE_BLIND:
        return "policy"
    if index == "down":
        return "index_down"
    if not keyed:
        return "no_keys"
    return "hit" if any(choice.hit) else "cold"


def _loadable(worker: Worker, claimed: Hit, prompt_tokens: int) -> tuple[int, int]:
    """Of what the index claims, the tokens the worker would load if it has them: (its own, shared)."""
    rate = worker.load.prefill_rate if worker.load.prefill_rate >= SLOWEST else DEFAULT_RATE
    candidate = Candidate(worker.id, hit=claimed, token_bytes=worker.token_bytes, bandwidth=worker.bandwidth)
    hit = cost(prompt_tokens, candidate, rate).hit  # without what is slower than computing
    # at least one token is always computed, and vLLM's own cache finds whole blocks only
    most = max(0, prompt_tokens - 1)
    most -= most % max(1, worker.block_size)
    local = min(most, sum(hit) - hit.shared)
    return local, min(most - local, hit.shared)
