"""Redis tier: chunks that every worker of a namespace shares, under keys a person can read.

    {model}@{world}@{rank}@{chunk_key_hex}         HASH    what it is, for people and for prefix()
    {model}@{world}@{rank}@{chunk_key_hex}_bytes   STRING  frame header + payload

The bytes are written first and both expire, so metadata without bytes means the bytes were evicted (it is
deleted when met), and bytes without metadata may be a write in progress (left alone; the next write completes
them).  Neither counts for prefix().  Trust is in the frame, never in the metadata.  A read renews what it
found.  Every command names one key, so the two keys of a chunk may live on two nodes of a Cluster.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import quote

from xxhash import xxh3_64

from cacheengine import frame
from cacheengine.errors import BadFrame, TierDown
from cacheengine.frame import HEADER_BYTES, FrameInfo
from cacheengine.keys import ChunkKey, Namespace
from cacheengine.tier import Ref
from cacheengine.tiers.redis_pool import Pool, Session, Ticket
from cacheengine.tiers.resp import Command, ErrorReply, Reply
from cacheengine.tiers.stats import TierStats

FORMAT = f"cairn-frame-{frame.VERSION}"
_WINDOW = 4  # chunks under way: hides the round trip, bounds what the server must buffer
_SLOWEST_BYTES_PER_SECOND = 50e6  # a deadline grows by this much per byte moved

_Ask = tuple[bytes, Command]  # a key, and a command about it

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
        codec: str = frame.RAW,
    ) -> None:
        self.stats = TierStats()
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._tokens = tokens
        self._rank = rank
        self._world = world
        self._codec = codec
        self._prefix = f"{escape(model)}@{world}@{rank}@"
        self._ttl = b"%d" % ttl_seconds
        self._timeout = timeout_ms / 1000
        self._pool = Pool(url, connections)
        self._facts = _flat(
            model_name=model, format=FORMAT, world_size=world, worker_id=worker_id,
            dtype=dtype, layout=layout,
        )  # fmt: skip

    def prefix(self, refs: Sequence[Ref]) -> int:
        if not refs:
            return 0
        with self._session(0) as session:
            names = [name for ref in refs for name in self._names(ref.key)]
            answers = session.call([(name, (b"EXISTS", name)) for name in names])
            pairs = list(zip(answers[::2], answers[1::2], strict=True))
            self._forget(session, [ref for ref, pair in zip(refs, pairs, strict=True) if pair == (1, 0)])
            here = next((i for i, pair in enumerate(pairs) if pair != (1, 1)), len(refs))
            if here < len(refs) and (refusal := _first_error(pairs[here])):
                return self._refused(here, refusal)
        return here

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        self._check(refs, into)
        if not refs:
            return 0
        filled: list[FrameInfo] = []
        try:
            with self._session(sum(map(len, into))) as session:
                end = self._fill(session, refs, into, filled)
                if isinstance(end, BadFrame):
                    log.warning("redis tier dropped %s: %s", refs[len(filled)].key.hex(), end)
                    self.stats.add(bad_frames=1)
                    self._forget(session, [refs[len(filled)]])
                if isinstance(end, ErrorReply):
                    self._refused(len(filled), end)
        except TierDown as exc:
            if not filled:
                raise
            log.warning("redis tier read %d of %d chunks: %s", len(filled), len(refs), exc)
        finally:
            self.stats.add(
                hits=len(filled),
                misses=int(len(filled) < len(refs)),
                bytes_read=sum(info.length for info in filled),
            )
        return len(filled)

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        self._check(refs, data)
        if not refs:
            return 0
        with self._session(sum(map(len, data))) as session:
            asked = [(name, (b"EXISTS", name)) for ref in refs for name in self._names(ref.key)]
            tickets = session.ask(asked + self._renewals(refs))
            first = self._commands(refs[0], data[0])  # its checksum, while the server looks
            here = session.answers(tickets)
            todo = [i for i in range(len(refs)) if here[2 * i : 2 * i + 2] != [1, 1]]
            done, refusal = self._put(
                session, (self._commands(refs[i], data[i]) if i else first for i in todo)
            )
            self.stats.add(bytes_written=sum(len(data[i]) for i in todo[:done]))
            if refusal:
                self._forget(session, [refs[todo[done]]])
                return self._refused(todo[done], refusal)
        return len(refs)

    def close(self) -> None:
        """Hang up; calls under way finish first or fail.  Later verbs raise TierDown."""
        self._pool.close()

    def _names(self, key: ChunkKey) -> tuple[bytes, bytes]:
        meta = f"{self._prefix}{key.hex()}".encode()
        return meta, meta + b"_bytes"

    def _check(self, refs: Sequence[Ref], buffers: Sequence[memoryview]) -> None:
        for _, buffer in zip(refs, buffers, strict=True):
            if not 0 < len(buffer) <= self._payload_bytes:
                raise ValueError(f"buffer of {len(buffer)} bytes, expected 1 to {self._payload_bytes}")

    @contextmanager
    def _session(self, nbytes: int) -> Iterator[Session]:
        seconds = self._timeout + nbytes / _SLOWEST_BYTES_PER_SECOND
        try:
            with self._pool.session(time.monotonic() + seconds) as session:
                yield session
        except TierDown:
            self.stats.add(errors=1)
            raise

    def _fill(
        self, session: Session, refs: Sequence[Ref], into: Sequence[memoryview], filled: list[FrameInfo]
    ) -> ErrorReply | BadFrame | None:
        """Read chunks in order, adding to `filled`; say what ended it, None for a miss or the end.

        The last burst of GETs carries what renews the chunks' expiry, so that costs no round trip of its own.
        """
        under_way: deque[Ticket] = deque()
        renewals: list[Ticket] = []
        end: FrameInfo | ErrorReply | BadFrame | None = None
        while (here := len(filled)) < len(refs):
            names = [self._names(ref.key)[1] for ref in refs[here : here + _WINDOW]]
            burst: list[_Ask] = [(name, (b"GET", name)) for name in names[len(under_way) :]]
            last = bool(burst) and here + _WINDOW >= len(refs)
            tickets = session.ask(burst + self._renewals(refs) if last else burst)
            under_way.extend(tickets[: len(burst)])
            renewals += tickets[len(burst) :]
            end = self._receive(session, under_way.popleft(), refs[here], into[here])
            if isinstance(end, FrameInfo):
                filled.append(end)
                continue
            session.discard(under_way)
            under_way.clear()
            if not session.follow(end, names[0]):
                break
        if filled and not renewals:
            renewals = session.ask(self._renewals(refs[: len(filled)]))
        session.answers(renewals)
        return None if isinstance(end, FrameInfo) else end

    def _receive(
        self, session: Session, ticket: Ticket, ref: Ref, view: memoryview
    ) -> FrameInfo | ErrorReply | BadFrame | None:
        """The reply to one GET, read to its end whatever it says, so the connection stays in step."""
        conn = session.bulk(ticket)
        length = conn.bulk_length()
        if isinstance(length, ErrorReply) and length.code == "WRONGTYPE":
            return BadFrame("not a string")
        if not isinstance(length, int):
            return length
        if length != HEADER_BYTES + len(view):
            conn.skip(length)
            conn.end_bulk()
            return BadFrame(f"value of {length} bytes")
        header = bytearray(HEADER_BYTES)
        checksum = xxh3_64()
        conn.receive_into(memoryview(header))
        conn.receive_into(view, checksum.update)  # what has just arrived is still in the CPU's caches
        conn.end_bulk()
        try:
            info = frame.parse(
                bytes(header), self._namespace, ref.key, len(view), self._rank, self._world, self._codec
            )
        except frame.OtherCodec:
            return None
        except BadFrame as exc:
            return exc
        return info if checksum.intdigest() == info.checksum else BadFrame("payload checksum")

    def _renewals(self, refs: Sequence[Ref]) -> list[_Ask]:
        """GT leaves what was pinned for ever as it is (Redis 7, Valkey)."""
        return [(name, (b"EXPIRE", name, self._ttl, b"GT")) for ref in refs for name in self._names(ref.key)]

    def _put(self, session: Session, chunks: Iterator[list[_Ask]]) -> tuple[int, ErrorReply | None]:
        """Send chunks; return how many leading ones are whole there, and the refusal that ended it."""
        under_way: deque[list[Ticket]] = deque()
        stored, refusal = 0, None
        while True:
            if not refusal and (asks := next(chunks, None)):
                under_way.append(session.ask(asks))
                if len(under_way) < _WINDOW:
                    continue
            if not under_way:
                return stored, refusal
            error = _first_error(session.answers(under_way.popleft()))
            refusal = refusal or error
            stored += not refusal

    def _commands(self, ref: Ref, view: memoryview) -> list[_Ask]:
        """What stores a chunk: its bytes, then its metadata."""
        meta, data = self._names(ref.key)
        tokens = self._tokens * len(view) // self._payload_bytes
        header = frame.pack(
            self._namespace, ref.key, ref.parent, ref.root, view, tokens, self._rank, self._world, self._codec
        )
        facts = _flat(
            tokens=tokens, bytes=HEADER_BYTES + len(view),
            checksum=f"{frame.payload_checksum(header):016x}", created=int(time.time()),
        )  # fmt: skip
        return [
            (data, (b"SET", data, (header, view), b"EX", self._ttl)),
            (meta, (b"HSET", meta, *self._facts, *facts)),
            (meta, (b"EXPIRE", meta, self._ttl)),
        ]

    def _forget(self, session: Session, refs: Sequence[Ref]) -> None:
        """Best effort: what cannot be deleted now will be met again, or expire."""
        if refs:
            with suppress(TierDown):
                session.call([(name, (b"UNLINK", name)) for ref in refs for name in self._names(ref.key)])

    def _refused(self, done: int, error: ErrorReply) -> int:
        """A server that refuses the very first chunk is down, unless it is merely full."""
        if not done and error.code != "OOM":
            raise TierDown(f"redis {self._pool.where}: {error.text}")
        self.stats.add(errors=1)
        return done


def escape(model: str) -> str:
    """A model name as it appears in keys: percent-encoded where it would break the key apart, or the shell
    lines people pipe keys through."""
    return "".join(quote(c, safe="") if c in "@%'\"\\" or c.isspace() else c for c in model)


def _flat(**facts: object) -> list[bytes]:
    """HSET's arguments."""
    return [str(part).encode() for pair in facts.items() for part in pair]


def _first_error(replies: Sequence[Reply]) -> ErrorReply | None:
    return next((reply for reply in replies if isinstance(reply, ErrorReply)), None)
