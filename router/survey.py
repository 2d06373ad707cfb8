"""What is known of every worker in front of one prompt: the index's word, and how far to believe it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from cacheengine.index_schema import NOTHING, Depths
from cacheengine.keys import ChunkKey, KeyScheme, digest
from router.hearsay import Hearsay
from router.load import LoadBoard
from router.pending import PendingPrefixes
from router.policy import NO_HIT, Candidate, Hit
from router.popular import Forks
from router.ring import Ring
from router.trust import Trust
from router.worker import Worker

Holders = Mapping[tuple[str, int], Depths]

_RINGS = 128  # memberships remembered: models, and retries that exclude one


class Question(NamedTuple):
    """One prompt that wants a worker.  `keys` are made with registry.scheme(model); `affinity` (say, the raw
    prompt's first bytes) steers the ring when there are none.  `session` is the caller's own name for the
    conversation, if it gave one."""

    model: str
    keys: Sequence[ChunkKey]
    tokens: int
    exclude: Collection[str] = ()
    affinity: bytes = b""
    session: bytes = b""


class Survey:
    """REQUIRES: used from one event loop."""

    def __init__(self, board: LoadBoard, trust: Trust, clock: Callable[[], float]) -> None:
        self._board, self._trust = board, trust
        self._pending, self._forks, self._hearsay = PendingPrefixes(clock), Forks(clock), Hearsay(clock)
        self._rings: dict[tuple[str, ...], Ring] = {}

    def candidates(
        self,
        asked: Question,
        workers: Mapping[str, Worker],
        scheme: KeyScheme | None,
        holders: Holders,
        by_session: bool,
        dry: bool = False,
    ) -> tuple[list[Candidate], dict[str, Hit]]:
        """Also what the index claims of each worker, whether we believe it or not.  `by_session`: the ring
        order of a prompt is its session's.  `dry` changes nothing that a later prompt sees."""
        # blobs in Redis outlive whoever put them there: lives that are over still count
        shared = max([depths.shared for depths in holders.values()], default=0)
        sent_to, sent = self._pending.find(asked.keys)
        ring_key = self._ring_key(asked, by_session)
        rank = self._rank(workers, ring_key)
        loads = [self._board.open(worker_id) for worker_id in workers]
        others = self._others(workers, loads, dry)
        candidates, claims = [], {}
        for worker, (inflight, prefilling) in zip(workers.values(), loads, strict=True):
            hit, pending = NO_HIT, 0
            held = holders.get((worker.id, worker.epoch), NOTHING)
            told = held is not NOTHING or shared or worker.id == sent_to
            if told and scheme is not None and worker.scheme == scheme:
                if held.shared != (common := shared if worker.shares else 0):
                    held = held._replace(shared=common)
                hit = claims[worker.id] = _stretches(held, scheme.chunk_tokens, asked.tokens)
                believed = self._believed(worker, held) if hit is not NO_HIT else held
                if worker.id == sent_to:
                    pending = max(0, sent - believed.local) * scheme.chunk_tokens
                    believed = believed._replace(device=max(believed.device, sent))
                if believed is not held:
                    hit = _stretches(believed, scheme.chunk_tokens, asked.tokens)
            load = worker.load
            candidates.append(
                Candidate(  # by place: names cost as much again
                    worker.id,
                    rank[worker.id],
                    inflight,
                    load.running,
                    prefilling + others[worker.id],
                    pending,
                    load.prefill_rate,
                    hit,
                    worker.token_bytes,
                    worker.bandwidth,
                    _held_back(worker, hit, ring_key),
                )
            )
        return candidates, claims

    def turned(
        self, asked: Question, workers: Mapping[str, Worker], candidates: list[Candidate], by_session: bool
    ) -> list[Candidate]:
        """The same candidates in front of a policy that wants another ring order."""
        ring_key = self._ring_key(asked, by_session)
        rank = self._rank(workers, ring_key)
        return [
            candidate._replace(
                ring=rank[candidate.worker],
                held_back=_held_back(workers[candidate.worker], candidate.hit, ring_key),
            )
            for candidate in candidates
        ]

    def sent(self, asked: Question, worker_id: str) -> None:
        """This prompt goes to this worker now; the index will hear of it later."""
        if asked.keys:
            self._pending.sent(asked.keys, worker_id)
            self._forks.passed(asked.keys)

    def _ring_key(self, asked: Question, by_session: bool) -> bytes:
        """A session keeps its place where that is the policy.  Elsewhere the prompt says more: a session's
        name is a guess about it, and steers the ring only when there are no keys."""
        if asked.session and (by_session or not asked.keys):
            return digest(asked.session)
        return self._forks.own(asked.keys) if asked.keys else digest(asked.affinity)

    def _rank(self, workers: Mapping[str, Worker], ring_key: bytes) -> dict[str, int]:
        return {worker_id: i for i, worker_id in enumerate(self._ring(workers).order(ring_key))}

    def prefixes(self, asked: Question, scheme: KeyScheme | None) -> dict[str, int]:
        """The names (hex) by which prompts like this one are counted → tokens up to there: what many prompts
        have in common, and the beginning of what is its own."""
        if scheme is None or not asked.keys:
            return {}
        shared = self._forks.shared(asked.keys)
        return {asked.keys[end - 1].hex(): end * scheme.chunk_tokens for end in (shared, shared + 1) if end}

    def _ring(self, workers: Mapping[str, Worker]) -> Ring:
        members = tuple(sorted(workers))
        if (ring := self._rings.get(members)) is None:
            if len(self._rings) >= _RINGS:
                del self._rings[next(iter(self._rings))]
            ring = self._rings[members] = Ring(members)
        return ring

    def _believed(self, worker: Worker, held: Depths) -> Depths:
        """A worker the index is wrong about counts as one that holds nothing itself."""
        if not self._trust.believes(worker, "local"):
            held = NOTHING._replace(shared=held.shared)
        return held if self._trust.believes(worker, "shared") else held._replace(shared=0)

    def _others(
        self, workers: Mapping[str, Worker], loads: Sequence[tuple[int, int]], dry: bool
    ) -> Mapping[str, float]:
        """Tokens that other gateways have queued on each worker."""
        heard, beats = {}, {}
        for worker, (_, ours) in zip(workers.values(), loads, strict=True):
            said = worker.load
            beats[worker.id] = said.beat_ms
            heard[worker.id] = self._board.others(worker.id, ours, said.queued_tokens, said.beat_ms, not dry)
        return self._hearsay.faded(heard, beats, note=not dry)


def _held_back(worker: Worker, hit: Hit, ring_key: bytes) -> bool:
    """A new worker takes a rising share of the prompts it holds nothing of: at first few of them, later
    those and more, the same at every gateway."""
    if worker.share >= 1 or hit.device or hit.host or hit.disk:
        return False
    return int.from_bytes(digest(ring_key, worker.id.encode())[:4], "big") / 2**32 >= worker.share


def _stretches(held: Depths, chunk_tokens: int, prompt_tokens: int) -> Hit:
    """Depths (from the front, per tier) → disjoint stretches in tokens: a faster tier serves first."""
    if held == NOTHING:
        return NO_HIT
    tokens, reached = [], 0
    for depth in held:
        end = max(reached, min(depth * chunk_tokens, prompt_tokens)) if depth else reached
        tokens.append(end - reached)
        reached = end
    return Hit(*tokens)
