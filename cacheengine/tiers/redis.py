"""Redis tier: chunks that every worker of a namespace shares, under keys a person can read.

    {model}@{world}@{rank}@{chunk_key_hex}         HASH    what it is, for people and for prefix()
    {model}@{world}@{rank}@{chunk_key_hex}_bytes   STRING  frame header + payload

The bytes are written first and both expire, so metadata without bytes means the bytes were evicted (it is
deleted when met), and bytes without metadata may be a write in progress (left alone; the next write completes
them).  Both are misses.  Trust is in the frame, never in the metadata.  Redis or Valkey, standalone: a
Cluster answers -MOVED, which is TierDown.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import quote

from cacheengine import frame
from cacheengine.errors import BadFrame, TierDown
from cacheengine.frame import HEADER_BYTES, FrameInfo
from cacheengine.keys import ChunkKey, Namespace
from cacheengine.tier import Ref
from cacheengine.tiers.resp import Connection, ErrorReply, Reply, address_of
from cacheengine.tiers.stats import TierStats

FORMAT = f"cairn-frame-{frame.VERSION}"
_WINDOW = 4  # chunks under way on one connection: hides the round trip, bounds what the server must buffer
_SLOWEST_BYTES_PER_SECOND = 50e6  # a deadline grows by this much per byte moved
_BACKOFF_SECONDS = (0.1, 2.0)  # between attempts to connect: first, longest
_PUT_REPLIES = 5  # SET, MULTI, HSET, EXPIRE, EXEC

log = logging.getLogger(__name__)


class RedisTier:
    """One rank's view of the shared tier.  Safe for as many threads as it has connections; more wait.

    Nothing connects before the first verb.  Every verb ends within `timeout_ms` plus its bytes at 50 MB/s, or
    raises TierDown; a connection that missed its deadline is never used again.  Raises ConfigError for a URL
    it cannot use.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        model: str,
        namespace: Namespace,
        payload_bytes: int,
        tokens: int,
        dtype: str,
        layout: str,
        rank: int,
        world: int,
        worker_id: str,
        ttl_seconds: int,
        timeout_ms: int,
        connections: int = 2,
    ) -> None:
        self.stats = TierStats()
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._tokens = tokens
        self._rank = rank
        self._world = world
        self._prefix = f"{escape(model)}@{world}@{rank}@"
        self._ttl = b"%d" % ttl_seconds
        self._timeout = timeout_ms / 1000
        self._pool = _Pool(url, connections)
        self._facts = _flat(
            model_name=model, format=FORMAT, world_size=world, worker_id=worker_id, tokens=tokens,
            dtype=dtype, layout=layout, bytes=HEADER_BYTES + payload_bytes,
        )  # fmt: skip

    def prefix(self, refs: Sequence[Ref]) -> int:
        if not refs:
            return 0
        with self._connection(0) as conn:
            conn.send(*((b"EXISTS", name) for ref in refs for name in self._names(ref.key)))
            answers = [(conn.reply(), conn.reply()) for _ in refs]
            self._forget(conn, [ref for ref, answer in zip(refs, answers, strict=True) if answer == (1, 0)])
            here = next((i for i, answer in enumerate(answers) if answer != (1, 1)), len(refs))
            if here < len(refs) and (refusal := _first_error(answers[here])):
                return self._refused(here, refusal)
        return here

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        self._check(refs, into)
        if not refs:
            return 0
        filled = sent = 0
        started = time.perf_counter()
        with self._connection(len(refs)) as conn:
            answer: FrameInfo | ErrorReply | BadFrame | None = None
            for ref, view in zip(refs, into, strict=True):
                burst = refs[sent : filled + _WINDOW]
                conn.send(*((b"GET", self._names(ahead.key)[1]) for ahead in burst))
                sent += len(burst)
                answer = self._receive(conn, ref, view)
                if not isinstance(answer, FrameInfo):
                    _drain(conn, sent - filled - 1)
                    break
                filled += 1
            self.stats.add(
                hits=filled,
                misses=int(filled < len(refs)),
                bytes_read=filled * self._payload_bytes,
                read_seconds=time.perf_counter() - started,
            )
            if isinstance(answer, BadFrame):
                log.warning("redis tier dropped %s: %s", refs[filled].key.hex(), answer)
                self.stats.add(bad_frames=1)
                self._forget(conn, [refs[filled]])
            if isinstance(answer, ErrorReply):
                return self._refused(filled, answer)
        return filled

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        self._check(refs, data)
        if not refs:
            return 0
        started = time.perf_counter()
        with self._connection(len(refs)) as conn:
            todo = self._absent(conn, refs)
            sent = done = 0
            refusal = None
            while done < sent or (sent < len(todo) and not refusal):
                if sent < len(todo) and sent - done < _WINDOW and not refusal:
                    self._put(conn, refs[todo[sent]], data[todo[sent]])
                    sent += 1
                    continue
                error = _first_error([conn.reply() for _ in range(_PUT_REPLIES)])
                if refusal or error:
                    refusal = refusal or error
                    sent -= 1  # not kept, or kept past a gap
                else:
                    done += 1
            self.stats.add(
                bytes_written=done * self._payload_bytes, write_seconds=time.perf_counter() - started
            )
            if refusal:
                self._forget(conn, [refs[todo[done]]])
                return self._refused(todo[done], refusal)
        return len(refs)

    def drop(self, refs: Sequence[Ref]) -> None:
        if not refs:
            return
        with self._connection(0) as conn:
            if refusal := _first_error(self._unlink(conn, refs)):
                self._refused(0, refusal)

    def close(self) -> None:
        """Hang up; calls under way finish first or fail.  Later verbs raise TierDown."""
        self._pool.close()

    def _names(self, key: ChunkKey) -> tuple[bytes, bytes]:
        meta = f"{self._prefix}{key.hex()}".encode()
        return meta, meta + b"_bytes"

    def _check(self, refs: Sequence[Ref], buffers: Sequence[memoryview]) -> None:
        for _, buffer in zip(refs, buffers, strict=True):
            if len(buffer) != self._payload_bytes:
                raise ValueError(f"buffer of {len(buffer)} bytes, expected {self._payload_bytes}")

    @contextmanager
    def _connection(self, chunks: int) -> Iterator[Connection]:
        seconds = self._timeout + chunks * self._payload_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            with self._pool.borrow(time.monotonic() + seconds) as conn:
                yield conn
        except TierDown:
            self.stats.add(errors=1)
            raise

    def _receive(
        self, conn: Connection, ref: Ref, view: memoryview
    ) -> FrameInfo | ErrorReply | BadFrame | None:
        """The reply to one GET, read to its end whatever it says, so the connection stays in step."""
        length = conn.bulk_length()
        if isinstance(length, ErrorReply) and length.code == "WRONGTYPE":
            return BadFrame("not a string")
        if not isinstance(length, int):
            return length
        if length != HEADER_BYTES + self._payload_bytes:
            conn.skip(length)
            conn.end_bulk()
            return BadFrame(f"value of {length} bytes")
        header = bytearray(HEADER_BYTES)
        conn.receive_into(memoryview(header))
        conn.receive_into(view)
        conn.end_bulk()
        try:
            info = frame.parse(
                bytes(header), self._namespace, ref.key, self._payload_bytes, self._rank, self._world
            )
            frame.verify(info, view)
        except BadFrame as exc:
            return exc
        return info

    def _absent(self, conn: Connection, refs: Sequence[Ref]) -> list[int]:
        """Which refs must be sent.  What is whole already gets a fresh TTL instead of megabytes."""
        conn.send(*((b"EXPIRE", name, self._ttl) for ref in refs for name in self._names(ref.key)))
        answers = [(conn.reply(), conn.reply()) for _ in refs]
        return [i for i, answer in enumerate(answers) if answer != (1, 1)]

    def _put(self, conn: Connection, ref: Ref, view: memoryview) -> None:
        """Send bytes, then metadata with its TTL in one transaction: _PUT_REPLIES replies."""
        meta, data = self._names(ref.key)
        header = frame.pack(
            self._namespace, ref.key, ref.parent, ref.root, view, self._tokens, self._rank, self._world
        )
        about = _flat(checksum=f"{frame.payload_checksum(header):016x}", created=int(time.time()))
        conn.send(
            (b"SET", data, (header, view), b"EX", self._ttl),
            (b"MULTI",),
            (b"HSET", meta, *self._facts, *about),
            (b"EXPIRE", meta, self._ttl),
            (b"EXEC",),
        )

    def _unlink(self, conn: Connection, refs: Sequence[Ref]) -> list[Reply]:
        conn.send(*((b"UNLINK", *self._names(ref.key)) for ref in refs))
        return [conn.reply() for _ in refs]

    def _forget(self, conn: Connection, refs: Sequence[Ref]) -> None:
        """Best effort: what cannot be deleted now will be met again, or expire."""
        if refs:
            with suppress(TierDown):
                self._unlink(conn, refs)

    def _refused(self, done: int, error: ErrorReply) -> int:
        """A server that refuses the very first chunk is down, unless it is merely full."""
        if not done and error.code != "OOM":
            raise TierDown(f"redis {self._pool.where}: {error.text}")
        self.stats.add(errors=1)
        return done


class _Pool:
    """A fixed number of connections, made when needed, each used by one thread at a time."""

    def __init__(self, url: str, connections: int) -> None:
        self._address = address_of(url)
        self.where = self._address.where
        self._lock = threading.Lock()  # guards what follows
        self._idle: queue.LifoQueue[Connection | None] = queue.LifoQueue()
        for _ in range(connections):
            self._idle.put(None)
        self._closed = False
        self._pause = _BACKOFF_SECONDS[0]
        self._retry_at = 0.0

    @contextmanager
    def borrow(self, deadline: float) -> Iterator[Connection]:
        """A connection in step, to be left in step; one that is left by an exception is closed."""
        try:
            idle = self._idle.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TierDown(f"redis {self.where}: all connections are busy") from None
        conn: Connection | None = None
        whole = False
        try:
            conn = self._usable(idle, deadline)
            yield conn
            whole = True
        finally:
            with self._lock:
                if conn and not (whole and not self._closed):
                    conn.close()
                    conn = None
                self._idle.put(conn)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            with suppress(queue.Empty):
                for _ in range(self._idle.qsize()):
                    if conn := self._idle.get_nowait():
                        conn.close()
            self._idle.put(None)  # whoever comes now or waits is told, one after the other

    def _usable(self, idle: Connection | None, deadline: float) -> Connection:
        if idle and not self._closed:
            idle.deadline = deadline
            if not idle.stale:
                return idle
        if idle:
            idle.close()
        with self._lock:
            if self._closed:
                raise TierDown(f"redis {self.where}: closed")
            if time.monotonic() < self._retry_at:
                raise TierDown(f"redis {self.where}: waiting to reconnect")
        try:
            conn = Connection(self._address, deadline - time.monotonic())
        except TierDown:
            with self._lock:
                self._retry_at = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, _BACKOFF_SECONDS[1])
            raise
        with self._lock:
            self._retry_at, self._pause = 0.0, _BACKOFF_SECONDS[0]
        return conn


def escape(model: str) -> str:
    """A model name as it appears in keys: `@`, `%` and white space percent-encoded."""
    return "".join(quote(c, safe="") if c in "@%" or c.isspace() else c for c in model)


def _flat(**facts: object) -> list[bytes]:
    """HSET's arguments."""
    return [str(part).encode() for pair in facts.items() for part in pair]


def _first_error(replies: Sequence[Reply]) -> ErrorReply | None:
    """The first refusal among replies, looking into EXEC's list too."""
    for reply in replies:
        if isinstance(reply, ErrorReply):
            return reply
        if isinstance(reply, list) and (inner := _first_error(reply)):
            return inner
    return None


def _drain(conn: Connection, replies: int) -> None:
    """Read GET replies nobody wants any more."""
    for _ in range(replies):
        length = conn.bulk_length()
        if isinstance(length, int):
            conn.skip(length)
            conn.end_bulk()
