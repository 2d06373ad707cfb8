"""One worker's side of the chunk index: a thread that tells Redis what this worker holds.

The engine calls publish() from its hot path and never waits.  Everything else happens here: coalescing,
reconnecting, the lease, and finding out what Redis or we have forgotten.  Four things heal:

* Redis lost the end of what it was told (a mark is behind), or all of it, or our lease: with the next beat a
  new life begins, told from the engine's own inventory.  Its epoch makes whatever is left of the old one
  invisible at once.
* More changed than fits into the queue: the same.
* Single entries are gone or wrong: every `check_seconds` a slice of what was told is compared in Redis and
  mended; a third of the expiry is one round.
* The engine holds something else than was told: compared once a round.

A wrong entry costs one recompute; a silent writer costs nothing but routing quality.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

from cacheengine.index_ledger import Ledger
from cacheengine.index_schema import Entry, WorkerInfo
from cacheengine.index_wire import Wire, epoch_of
from cacheengine.keys import ChunkKey
from cacheengine.redis_url import DOWN
from cacheengine.wishes import Listener

log = logging.getLogger(__name__)

WINDOW_SECONDS = 0.02  # how long changes may gather
BATCH_ENTRIES = 256  # ... and how many
MAX_PENDING = 100_000  # distinct chunks waiting for Redis; beyond it start over from the inventory
BACKOFF_SECONDS = (0.05, 2.0)
BUSY_SECONDS = 0.25  # between beats while requests run: every gateway wants to know what others sent here
CHECK_SECONDS = 30.0
DRIFT_SECONDS = 1.0  # until the next slice when one was wrong
ROUNDS_A_LIFETIME = 3  # every entry is renewed this often before it would expire
SWEEP_GRACE_MS = 600_000  # a life younger than this may still be announcing itself


@dataclass(slots=True)
class WriterStats:
    """Counters since start; read by the engine's metrics."""

    written: int = 0  # entries Redis took, announcements included
    announcements: int = 0
    overflows: int = 0
    errors: int = 0  # lost connections and refused commands
    beats: int = 0
    losses: int = 0  # times Redis had forgotten what it had acknowledged
    rounds: int = 0  # times everything told was compared
    mended: int = 0  # entries that were found missing or wrong, there or here
    swept: int = 0  # lives that were over and were removed


class _Superseded(Exception):
    """A younger process carries our worker id."""


class IndexWriter:
    """REQUIRES: `heartbeat` and `inventory` are thread-safe (they run on the writer's thread), the engine
    changes its own map *before* it calls publish(), and entries come parents first.

    `ttl_seconds` is the expiry of entries, `lease_seconds` that of the worker.
    """

    def __init__(
        self,
        url: str,
        info: WorkerInfo,
        ttl_seconds: float,
        lease_seconds: float,
        heartbeat: Callable[[], Mapping[str, float | int | str]],
        inventory: Callable[[], list[Entry]],
        *,
        max_pending: int = MAX_PENDING,
        check_seconds: float = CHECK_SECONDS,
        wishes: Listener | None = None,
    ) -> None:
        self._url, self._info = url, info
        self._ttl, self._lease = ttl_seconds, lease_seconds
        self._heartbeat, self._inventory = heartbeat, inventory
        self._max_pending, self._check_seconds = max_pending, check_seconds
        self._checks = max(1, int(ttl_seconds / ROUNDS_A_LIFETIME / check_seconds))  # a round
        self._wishes = wishes
        self._pending: dict[ChunkKey, Entry] = {}
        self._dirty = True  # Redis may hold something else than the inventory
        self._closing = False
        self._changed = threading.Condition()
        self._beaten = self._next_beat = self._next_check = 0.0
        self._told, self._marks = Ledger(), dict[str, int]()
        self._todo: list[list[tuple[ChunkKey, list[ChunkKey]]]] = []  # slices, of this round
        self._step = 0  # slices a check
        self._lives, self._horizon = set[str](), 0  # alive when this round began; older others are dead
        self._before, self._begun = 0, 0.0  # epoch of the life before; when this one began
        self._thread = threading.Thread(target=self._run, name="cairn-index", daemon=True)
        self.stats = WriterStats()

    @property
    def epoch(self) -> int:
        """Of this worker's present life in the index; 0 before Redis gave one."""
        return self._info.epoch

    def start(self) -> None:
        """Begin to beat and announce.  Once."""
        self._thread.start()

    def publish(self, entries: Sequence[Entry]) -> None:
        """Tell where chunks are now.  Never blocks on Redis, never raises; the last word on a chunk wins."""
        with self._changed:
            was_idle = not self._pending
            for entry in entries:
                self._pending[entry.key] = entry
            if len(self._pending) > self._max_pending:
                self._pending.clear()
                self._dirty = True
                self.stats.overflows += 1
            if was_idle or len(self._pending) >= BATCH_ENTRIES:
                self._changed.notify()

    def close(self, timeout: float = 2.0) -> None:
        """Give the lease back and stop, waiting at most `timeout` seconds.  Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    # the thread

    def _run(self) -> None:
        delay = BACKOFF_SECONDS[0]
        while not self._closing:
            before = self.stats.beats
            try:
                with closing(Wire(self._url, self._ttl, self._marks)) as wire:
                    self._next_beat = 0.0
                    while self._turn(wire):
                        pass
                return
            except _Superseded:
                log.error(
                    "another process took worker id %r; this one leaves the index", self._info.worker_id
                )
                return
            except (*DOWN, OSError) as exc:
                self.stats.errors += 1
                if delay == BACKOFF_SECONDS[0]:
                    log.warning("chunk index: %s; will keep trying", exc)
            except Exception:  # the top of a thread: a bug in a callback must not silence the worker
                self.stats.errors += 1
                log.exception("chunk index writer")
            delay = BACKOFF_SECONDS[0] if self.stats.beats > before else min(2 * delay, BACKOFF_SECONDS[1])
            with self._changed:
                self._changed.wait_for(lambda: self._closing, delay)

    def _turn(self, wire: Wire) -> bool:
        """Sleep until something is to be said, and say it; False when closed.  Raises what redis-py raises,
        and _Superseded."""
        batch = self._collect()
        if self._closing:
            wire.leave(self._info)
            return False
        try:
            if self._info.epoch and time.monotonic() >= self._next_beat:
                self._beat(wire)
            if self._dirty:
                self._begin_life(wire)  # an inventory taken after the batch was published has the last word
            else:
                self._write(wire, batch)
                if batch:  # something was computed: the load is another
                    self._next_beat = min(self._next_beat, self._beaten + BUSY_SECONDS)
                if time.monotonic() >= self._next_check:
                    self._check(wire)
        except BaseException:
            self._put_back(batch)
            raise
        return True

    def _collect(self) -> list[Entry]:
        """Sleep until there is work or a beat is due; take at most one batch."""

        def due() -> float:
            return max(0.0, min(self._next_beat, self._next_check) - time.monotonic())

        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._dirty or self._pending, due())
            if self._pending and not self._dirty:
                self._changed.wait_for(
                    lambda: self._closing or len(self._pending) >= BATCH_ENTRIES,
                    min(WINDOW_SECONDS, due()),
                )
            taken = [self._pending[key] for key in islice(self._pending, BATCH_ENTRIES)]
            for entry in taken:
                del self._pending[entry.key]
            return taken

    def _put_back(self, batch: Iterable[Entry]) -> None:
        with self._changed:
            if self._dirty:  # the inventory will say it
                return
            # what failed is older than what was published meanwhile
            self._pending = {entry.key: entry for entry in batch} | self._pending

    def _begin_life(self, wire: Wire) -> None:
        """A new epoch makes every earlier claim of ours invisible at once; then say what we really hold."""
        with self._changed:
            self._dirty = False
            self._pending.clear()
        try:
            self._told.clear()
            self._marks.clear()
            epoch, self._before = wire.epoch(self._info)
            self._info, self._begun = replace(self._info, epoch=epoch), time.monotonic()
            self._beat(wire)
            self._tell(wire, self._inventory())
            self.stats.announcements += 1
            self._begin_round(wire)
        except BaseException:
            self._dirty = True
            raise

    def _beat(self, wire: Wire) -> None:
        """Renew the lease.  One that vanished means Redis was flushed, or that we were silent too long and
        others may have swept our entries: start over.  Raises _Superseded."""
        words = {name: str(value) for name, value in self._heartbeat().items()}
        words |= self._wishes.words() if self._wishes else {}
        found = wire.beat(self._info, self._lease, words)
        if found > self._info.epoch:
            raise _Superseded
        if (not found and self.stats.beats) or wire.lost():
            self.stats.losses += not self._dirty
            self._dirty = True
        self.stats.beats += 1
        busy = any(float(words.get(name, 0)) for name in ("running", "waiting"))
        self._beaten = time.monotonic()
        self._next_beat = self._beaten + min(self._lease / 3, BUSY_SECONDS if busy else self._lease)
        if self._wishes and wire.listen(self._wishes, self._info.namespace):
            self._next_beat = 0.0  # somebody waits to read that it was obeyed

    def _tell(self, wire: Wire, entries: Sequence[Entry]) -> None:
        """Write any number of entries, with beats between."""
        for start in range(0, len(entries), BATCH_ENTRIES):
            if self._closing:
                return
            self._write(wire, entries[start : start + BATCH_ENTRIES])
            if time.monotonic() >= self._next_beat:
                self._beat(wire)

    def _write(self, wire: Wire, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        # after a lifetime of entries, whoever holds the same chunks has swept what is left of the life before
        young = time.monotonic() - self._begun < self._ttl
        wire.write(self._info, entries, self._before if young else 0)
        self._told.note(entries)
        self.stats.written += len(entries)

    def _check(self, wire: Wire) -> None:
        """Compare the next slices of what was told with what Redis has; sweep the dead named there."""
        wrong = 0
        for _ in range(min(self._step, len(self._todo))):
            pieces = [self._told.still(root, keys) for root, keys in self._todo.pop()]
            mended, others = wire.check(self._info, pieces)
            wrong += mended
            if dead := {field for field in others - self._lives if epoch_of(field) < self._horizon}:
                wire.sweep(self._info, pieces, dead)
                self.stats.swept += len(dead)
            if time.monotonic() >= self._next_beat:
                self._beat(wire)
        if not self._todo:
            wrong += self._compare(wire)
            self._begin_round(wire)
        self.stats.mended += wrong
        pause = min(DRIFT_SECONDS, self._check_seconds) if wrong else self._check_seconds
        self._next_check = time.monotonic() + pause

    def _compare(self, wire: Wire) -> int:
        """The end of a round: does the engine hold what was told?  Returns how many entries were wrong."""
        inventory = self._inventory()
        with self._changed:  # what is published is newer, and written next
            said = set(self._pending)
        differing = [entry for entry in self._told.differing(inventory) if entry.key not in said]
        self._tell(wire, differing)
        self.stats.rounds += 1
        return len(differing)

    def _begin_round(self, wire: Wire) -> None:
        self._lives, now = wire.lives(self._info.namespace)
        self._horizon = now - SWEEP_GRACE_MS
        self._todo = self._told.slices(BATCH_ENTRIES)
        self._step = -(-len(self._todo) // self._checks)
        self._next_check = time.monotonic() + self._check_seconds
