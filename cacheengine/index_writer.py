"""One worker's side of the chunk index: a thread that tells Redis what this worker holds.

The engine calls publish() from its hot path and never waits.  Everything else happens here: coalescing,
reconnecting, the lease, and starting over from the engine's own inventory whenever Redis may have missed
something.  A wrong entry costs one recompute; a silent writer costs nothing but routing quality.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cacheengine import redis_url
from cacheengine.index_schema import (
    FLEET,
    SEPARATOR,
    Entry,
    WorkerInfo,
    chunk_name,
    epoch_name,
    field_of,
    lease_name,
)
from cacheengine.keys import ChunkKey
from cacheengine.wishes import Listener

log = logging.getLogger(__name__)

WINDOW_SECONDS = 0.02  # how long changes may gather
BATCH_ENTRIES = 256  # ... and how many
MAX_PENDING = 100_000  # distinct chunks waiting for Redis; beyond it start over from the inventory
SOCKET_SECONDS = 2.0
BACKOFF_SECONDS = (0.05, 2.0)
EPOCH_TTL_MS = 30 * 86_400_000  # after that the server's clock alone carries the epoch
SWEEP_GRACE_MS = 600_000  # a life younger than this may still be announcing itself
FLEET_FORGET_MS = 3_600_000

_LUA = Path(__file__).parent


@dataclass(slots=True)
class WriterStats:
    """Counters since start; read by the engine's metrics."""

    written: int = 0  # entries Redis took, announcements included
    announcements: int = 0
    overflows: int = 0
    errors: int = 0  # lost connections and refused commands
    beats: int = 0


class _Superseded(Exception):
    """A younger process carries our worker id."""


class IndexWriter:
    """REQUIRES: `heartbeat` and `inventory` are thread-safe (they run on the writer's thread), the engine
    changes its own map *before* it calls publish(), and entries come parents first.

    `ttl_seconds` is the expiry of entries, refreshed at half of it; `lease_seconds` that of the worker.
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
        wishes: Listener | None = None,
    ) -> None:
        self._url, self._info = url, info
        self._ttl, self._lease = ttl_seconds, lease_seconds
        self._heartbeat, self._inventory = heartbeat, inventory
        self._max_pending = max_pending
        self._wishes = wishes
        self._namespace = bytes.fromhex(info.namespace)
        self._pending: dict[ChunkKey, Entry] = {}
        self._dirty = True  # Redis may hold something else than the inventory
        self._closing = False
        self._changed = threading.Condition()
        self._next_beat = self._next_refresh = 0.0
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
                with self._connect() as client:
                    self._session(client)
                return
            except _Superseded:
                log.error(
                    "another process took worker id %r; this one leaves the index", self._info.worker_id
                )
                return
            except (redis.RedisError, OSError) as exc:
                self.stats.errors += 1
                if delay == BACKOFF_SECONDS[0]:
                    log.warning("chunk index: %s; will keep trying", exc)
            except Exception:  # the top of a thread: a bug in a callback must not silence the worker
                self.stats.errors += 1
                log.exception("chunk index writer")
            delay = BACKOFF_SECONDS[0] if self.stats.beats > before else min(2 * delay, BACKOFF_SECONDS[1])
            with self._changed:
                self._changed.wait_for(lambda: self._closing, delay)

    def _connect(self) -> redis.Redis:
        client = redis_url.client(
            self._url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            retry=Retry(NoBackoff(), 0),  # _run() retries, with the books put right first
            protocol=2,
        )
        self._epoch_script = client.register_script((_LUA / "index_epoch.lua").read_text())
        self._beat_script = client.register_script((_LUA / "index_beat.lua").read_text())
        self._write_script = client.register_script((_LUA / "index_write.lua").read_text())
        return client

    def _session(self, client: redis.Redis) -> None:
        """Serve until closed.  Raises what redis-py raises."""
        self._next_beat = 0.0
        while True:
            batch = self._collect()
            if self._closing:
                self._leave(client)
                return
            try:
                if self._info.epoch and time.monotonic() >= self._next_beat:
                    self._beat(client)
                if self._dirty:
                    self._begin_life(client)
                elif time.monotonic() >= self._next_refresh:
                    self._announce(client)
                else:
                    self._write(client, batch)
                    continue
                # an inventory taken after the batch was published has the last word on it
            except BaseException:
                self._put_back(batch)
                raise

    def _collect(self) -> list[Entry]:
        """Sleep until there is work or a beat is due; take at most one batch."""

        def due() -> float:
            return max(0.0, min(self._next_beat, self._next_refresh) - time.monotonic())

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

    def _begin_life(self, client: redis.Redis) -> None:
        """A new epoch makes every earlier claim of ours invisible at once; then say what we really hold."""
        with self._changed:
            self._dirty = False
            self._pending.clear()
        try:
            epoch = self._epoch_script(
                keys=[epoch_name(self._info.namespace, self._info.worker_id)],
                args=[self._info.epoch, EPOCH_TTL_MS],
                client=client,
            )
            self._info = replace(self._info, epoch=int(epoch))
            self._beat(client)
            self._announce(client)
        except BaseException:
            self._dirty = True
            raise

    def _beat(self, client: redis.Redis) -> None:
        """Renew the lease.  One that vanished means Redis was flushed, or that we were silent too long and
        others may have swept our entries: start over.  Raises _Superseded."""
        info = self._info
        held = {name: str(value) for name, value in self._heartbeat().items()} | info.fields()
        held |= self._wishes.words() if self._wishes else {}
        found, now = self._beat_script(
            keys=[lease_name(info.namespace, info.worker_id)],
            args=[int(self._lease * 1000), info.epoch, *(part for pair in held.items() for part in pair)],
            client=client,
        )
        if found and int(found) > info.epoch:
            raise _Superseded
        if not found and self.stats.beats:
            self._dirty = True
        with client.pipeline(transaction=False) as pipe:
            pipe.zadd(FLEET, {f"{info.namespace}:{info.worker_id}": int(now)})
            pipe.zremrangebyscore(FLEET, "-inf", int(now) - FLEET_FORGET_MS)
            if self._wishes:
                self._wishes.ask(pipe)
            answers = pipe.execute()
        self.stats.beats += 1
        self._next_beat = time.monotonic() + self._lease / 3
        if self._wishes and self._wishes.hear(client, answers[-2:]):
            self._next_beat = 0.0  # somebody waits to read that it was obeyed

    def _announce(self, client: redis.Redis) -> None:
        """Write the whole inventory, renewing every expiry, and sweep fields of the dead on the way."""
        now = client.time()
        horizon = int(now[0]) * 1000 - SWEEP_GRACE_MS
        live = self._live_fields(client)
        entries = self._inventory()
        for start in range(0, len(entries), BATCH_ENTRIES):
            if self._closing:
                return
            self._write(client, entries[start : start + BATCH_ENTRIES], max(1, horizon), live)
            if time.monotonic() >= self._next_beat:
                self._beat(client)
        self.stats.announcements += 1
        self._next_refresh = time.monotonic() + self._ttl / 2

    def _live_fields(self, client: redis.Redis) -> list[str]:
        prefix = self._info.namespace + ":"
        members = cast(list[bytes], client.zrange(FLEET, 0, -1))
        peers = [m for raw in members if (m := raw.decode()).startswith(prefix)]
        with client.pipeline(transaction=False) as pipe:
            for member in peers:
                pipe.hget(lease_name(self._info.namespace, member.removeprefix(prefix)), "epoch")
            epochs = pipe.execute()
        return [
            f"{member.removeprefix(prefix)}{SEPARATOR}{epoch.decode()}"
            for member, epoch in zip(peers, epochs, strict=True)
            if epoch is not None
        ]

    def _write(
        self, client: redis.Redis, entries: Sequence[Entry], horizon: int = 0, live: Sequence[str] = ()
    ) -> None:
        """One round trip; one script call per prefix family, removals before additions.

        Keys travel packed: five arguments a family instead of three commands a chunk keep the time this
        thread holds the engine's interpreter lock small.
        """
        families: dict[ChunkKey, list[Entry]] = {}
        for entry in sorted(entries, key=lambda e: e.bits != 0):
            families.setdefault(entry.root, []).append(entry)
        if not families:
            return
        field = field_of(self._info.worker_id, self._info.epoch)
        with client.pipeline(transaction=False) as pipe:
            for root, family in families.items():
                packed = b"".join(entry.key for entry in family)
                bitmaps = bytes(entry.bits for entry in family)
                args: list[str | int | bytes] = [
                    field,
                    int(self._ttl * 1000),
                    packed,
                    bitmaps,
                    horizon,
                    *live,
                ]
                self._write_script([chunk_name(self._namespace, root, root)], args, pipe)
            pipe.execute()
        self.stats.written += len(entries)

    def _leave(self, client: redis.Redis) -> None:
        info = self._info
        name = lease_name(info.namespace, info.worker_id)
        held = client.hget(name, "epoch")
        if held is not None and int(held) == info.epoch:
            with client.pipeline(transaction=False) as pipe:
                pipe.delete(name)
                pipe.zrem(FLEET, f"{info.namespace}:{info.worker_id}")
                pipe.execute()
