"""The hands of the cache: they execute Plans and make no decisions.

One batched gather per step on the engine's own thread (the pages may be reused right after it), then
everything else on threads of ours: reads and scatters on the loaders, writes on one writer a tier.
Every plan is reported, whatever fails: a lost report would leak the engine's blocks.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from cacheengine import ops
from cacheengine.arena import Arena
from cacheengine.errors import CacheError
from cacheengine.plan import GONE, HOST, SKIP, Move, Op, Plan, Report, Timing
from cacheengine.pool import submit
from cacheengine.tier import Ref, Tier

logger = logging.getLogger(__name__)

_READ_BATCH = 4  # chunks a loader reads before it scatters: keeps the two overlapping between loaders


@dataclass(slots=True)
class Outcome:
    """What happened since the last poll()."""

    reports: list[Report] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)  # requests whose load is over, well or not
    bad_blocks: set[int] = field(default_factory=set)
    timings: list[Timing] = field(default_factory=list)
    verify_failures: int = 0


class Mover:
    """`tiers` are what lies below the host arena, by name.  Thread-safe: poll() may race with anything."""

    def __init__(
        self,
        paged: ops.Paged,
        arena: Arena,
        tiers: Mapping[str, Tier],
        *,
        io_threads: int,
        cores: frozenset[int],
        verify_loads: bool = False,
    ) -> None:
        self._paged, self._arena, self._tiers = paged, arena, dict(tiers)
        self._verify = Arena(1, arena.slot_bytes) if verify_loads else None
        self._lock = threading.Lock()
        self._outcome = Outcome()
        settle_on = _pin_to(cores)
        self._loaders = ThreadPoolExecutor(io_threads, "cairn-load", settle_on)
        self._writers = {name: ThreadPoolExecutor(1, f"cairn-write-{name}", settle_on) for name in tiers}

    # -- called by the engine's thread -------------------------------------------------------------

    def save(self, plans: Sequence[Plan]) -> None:
        """Gather every chunk of these plans, now."""
        moves = [move for plan in plans for move in plan.moves]
        if not moves:
            return
        start = time.perf_counter()
        try:
            ops.gather(self._paged, [m.blocks for m in moves], [self._arena.address(m.host) for m in moves])
        except (ValueError, RuntimeError):  # a bug of ours must not fail the engine's step
            logger.exception("a gather failed; nothing of this step is kept")
            self._report(Report(plan.id, 0) for plan in plans)
            return
        self._measured(HOST, "gather", moves, time.perf_counter() - start)
        self._report(Report(plan.id, len(plan.moves)) for plan in plans)

    def demote(self, plan: Plan) -> None:
        """Start writing a plan's chunks from their host slots to the tier below.  The caller bounds how many
        are under way."""
        try:
            submit(self._writers[plan.moves[0].tier], partial(self._write, plan))
        except RuntimeError as exc:  # no thread to be had
            logger.warning("writing plan %d cannot start: %s", plan.id, exc)
            self._report([Report(plan.id, 0)])

    def load(self, plan: Plan) -> None:
        """Start bringing a plan's chunks into its blocks; poll() tells when it is over."""
        job = _Load(plan, [False] * len(plan.moves))
        batches = _batches(plan.moves)
        job.open = len(batches)
        for batch in batches:
            try:
                submit(self._loaders, partial(self._load_batch, job, batch))
            except RuntimeError as exc:  # no thread to be had: a miss, and reported as one
                logger.warning("load of plan %d cannot start: %s", plan.id, exc)
                self._finish_batch(job, batch, 0)

    def poll(self) -> Outcome:
        with self._lock:
            outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def close(self) -> None:
        for pool in (self._loaders, *self._writers.values()):
            pool.shutdown(wait=True, cancel_futures=True)
        for tier in self._tiers.values():
            tier.close()
        self._arena.close()

    # -- loading -----------------------------------------------------------------------------------

    def _load_batch(self, job: "_Load", batch: range) -> None:
        done = 0
        try:
            moves = [job.plan.moves[i] for i in batch]
            brought = self._bring(moves)
            self._scatter(moves[:brought])
            done = brought
        except CacheError as exc:
            logger.warning("load of plan %d ends early: %s", job.plan.id, exc)
        except Exception:  # the top of a thread: a lost report would leak blocks
            logger.exception("load of plan %d failed", job.plan.id)
        self._finish_batch(job, batch, done)

    def _bring(self, moves: Sequence[Move]) -> int:
        """Fill the host slots of one batch (one tier) from below; how many leading ones are filled."""
        tier = moves[0].tier
        if tier == HOST:
            return len(moves)
        if tier == GONE:
            return 0
        start = time.perf_counter()
        got = self._tiers[tier].read([_ref(m) for m in moves], [self._view(m) for m in moves])
        self._measured(tier, "read", moves[:got], time.perf_counter() - start)
        return got

    def _scatter(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        start = time.perf_counter()
        ops.scatter(self._paged, [m.blocks for m in moves], [self._arena.address(m.host) for m in moves])
        self._measured(HOST, "scatter", moves, time.perf_counter() - start)
        if self._verify is not None:
            self._check_pages(moves, self._verify)

    def _check_pages(self, moves: Sequence[Move], scratch: Arena) -> None:
        """Re-read what was written.  Raises CacheError when a page differs."""
        for move in (m for m in moves if SKIP not in m.blocks):
            with self._lock:  # one scratch slot for all loaders
                ops.gather(self._paged, [move.blocks], [scratch.address(0)])
                size = self._bytes(move)
                same = scratch.view(0)[:size] == self._view(move)
                self._outcome.verify_failures += not same
            if not same:
                raise CacheError(f"pages of chunk {move.key.hex()} differ from what was loaded")

    def _finish_batch(self, job: "_Load", batch: range, done: int) -> None:
        with self._lock:
            for i in batch[:done]:
                job.ok[i] = True
            job.open -= 1
            if job.open:
                return
            kept = job.ok.index(False) if False in job.ok else len(job.ok)
            lost = job.plan.moves[kept:]
            self._outcome.bad_blocks.update(block for m in lost for block in m.blocks if block != SKIP)
            self._outcome.reports.append(Report(job.plan.id, kept))
            self._outcome.loaded.add(job.plan.req_id)

    # -- writing below -----------------------------------------------------------------------------

    def _write(self, plan: Plan) -> None:
        moves, tier, kept = plan.moves, plan.moves[0].tier, 0
        start = time.perf_counter()
        try:
            kept = self._tiers[tier].write([_ref(m) for m in moves], [self._view(m) for m in moves])
            self._measured(tier, "write", moves[:kept], time.perf_counter() - start)
        except CacheError as exc:
            logger.debug("writing to %s failed: %s", tier, exc)
        except Exception:  # the top of a thread
            logger.exception("writing to %s failed", tier)
        self._report([Report(plan.id, kept)])

    # -- inside ------------------------------------------------------------------------------------

    def _report(self, reports: Iterable[Report]) -> None:
        with self._lock:
            self._outcome.reports.extend(reports)

    def _bytes(self, move: Move) -> int:
        return self._paged.chunk_bytes(move.size)

    def _view(self, move: Move) -> memoryview:
        """What a move's chunk fills of its host slot: a tail is shorter than the slot."""
        return self._arena.view(move.host)[: self._bytes(move)]

    def _measured(self, tier: str, op: Op, moves: Sequence[Move], seconds: float) -> None:
        if moves:
            timing = Timing(tier, op, sum(map(self._bytes, moves)), seconds)
            with self._lock:
                self._outcome.timings.append(timing)


@dataclass(slots=True)
class _Load:
    """A load under way: which chunks made it, how many batches are still out."""

    plan: Plan
    ok: list[bool]
    open: int = 0


def _batches(moves: Sequence[Move]) -> list[range]:
    """Runs of one tier, none longer than a read batch."""
    batches: list[range] = []
    start = 0
    for i in range(1, len(moves) + 1):
        if i == len(moves) or moves[i].tier != moves[start].tier or i - start == _READ_BATCH:
            batches.append(range(start, i))
            start = i
    return batches


def _ref(move: Move) -> Ref:
    return Ref(move.key, move.slot, move.parent, move.root)


def _pin_to(cores: frozenset[int]) -> Callable[[], None]:
    """Threads inherit the compute threads' pinning; ours belong on the cores vLLM left free."""

    def settle() -> None:
        if cores:
            with contextlib.suppress(OSError):  # a cpuset may allow none of them; then stay where we are
                os.sched_setaffinity(threading.get_native_id(), cores)

    return settle
