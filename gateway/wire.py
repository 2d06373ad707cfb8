"""HTTP/1.1 to workers: connections on asyncio's transports, answers parsed by httptools.  No routing.

Why not a client library: docs/adr/0026.  What a proxy needs of one is little and has to be exact: bytes as
they came, a closed connection when the caller lets go, an error that says whether the request got there.
Cookies, redirects, proxies from the environment, decompression and retries are what it must not have.

Framing is llhttp's (RFC 9112): lengths, chunks, trailers, interim answers; what is none of them is refused.
"""

import asyncio
import math
import re
import ssl
from collections.abc import AsyncIterable, Callable
from typing import NamedTuple, Protocol, Self, cast
from urllib.parse import urlsplit

import httptools

Headers = list[tuple[bytes, bytes]]

KEEPALIVE_SECONDS = 4.0  # vLLM's server drops idle connections after 5 s: let go a little earlier
_MAX_UNREAD_BYTES = 256 << 10  # of an answer, before the worker is made to wait
_MAX_HEAD_BYTES = 64 << 10
_ONE_WRITE_BYTES = 16 << 10  # a longer body is not copied to go with its head
_UNFIT = re.compile(rb"[\x00-\x20\x7f]")  # in a request target
_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH"))


class WireError(Exception):
    """Root of what goes wrong between us and a worker."""


class NotConnected(WireError):
    """The request never got there."""


class Broken(WireError):
    """The connection ended, or carried what is no HTTP, before the answer was complete."""


class Unsendable(WireError):
    """A header or a path that would be read as something else on the other side."""


class Question(NamedTuple):
    """One request.  `body` goes as it is; without a `length` an iterable body is sent in chunks, with one it
    must have that many bytes.  What the iterable raises comes out of ask() or read().  `connected` is called
    when a connection is there, new or kept.  `again`: the worker may do it twice, if the first is lost."""

    base_url: str
    target: bytes  # path and query
    headers: Headers
    body: bytes | AsyncIterable[bytes] = b""
    length: int | None = None
    method: bytes = b"POST"
    connect_seconds: float = 2.0
    connected: Callable[[], None] | None = None
    again: bool = False


class Reply(Protocol):
    """An answer of which the head is here."""

    status: int
    headers: Headers  # names in lower case, in order, repeated ones too

    @property
    def over(self) -> bool:
        """Nothing comes after what was read."""

    async def read(self) -> bytes:
        """The next bytes of the body, b"" at its end.  What is not read makes the worker wait.  Raises
        Broken."""

    def close(self) -> None:
        """Let go; an answer that is not at its end is cut off, which is how a worker learns to stop."""


class Transport(Protocol):
    """What carries questions to workers."""

    async def ask(self, question: Question) -> Reply:
        """Once the answer's head is here.  Cancelling closes the connection.  Raises NotConnected, Broken,
        Unsendable."""

    async def aclose(self) -> None:
        """No more questions."""


class Origin(NamedTuple):
    host: str
    port: int
    tls: bool
    prefix: bytes  # of every path
    name: bytes  # for the Host header

    @classmethod
    def of(cls, url: str) -> "Origin":
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        name = parts.netloc.rpartition("@")[2].encode("idna" if not parts.netloc.isascii() else "ascii")
        return cls(parts.hostname or "", port, tls, parts.path.rstrip("/").encode(), name)


class Wire:
    """A Transport without a limit of connections: max_inflight is the limit.  REQUIRES: used from one event
    loop.  `tls` verifies workers with https URLs."""

    def __init__(
        self, tls: ssl.SSLContext | None = None, keepalive_seconds: float = KEEPALIVE_SECONDS
    ) -> None:
        self._tls, self._keepalive = tls, keepalive_seconds
        self._origins: dict[str, Origin] = {}
        self._idle: dict[Origin, dict[_Line, None]] = {}  # the youngest last

    async def ask(self, question: Question) -> Reply:
        origin = self._origins.get(question.base_url)
        if origin is None:
            if len(self._origins) > 4096:
                self._origins.clear()  # addresses of workers come and go
            origin = self._origins[question.base_url] = Origin.of(question.base_url)
        head = _head(question, origin)
        kept = self._kept(origin)
        line = kept or await self._connected(origin, question.connect_seconds)
        try:
            return await line.answer(head, question)
        except Broken:
            if kept is None or not kept.stale(question):
                raise
        try:
            line = await self._connected(origin, question.connect_seconds)
        except NotConnected as exc:
            raise Broken(repr(exc)) from exc  # it may have got there, and have killed the worker
        return await line.answer(head, question)

    async def aclose(self) -> None:
        for lines in self._idle.values():
            for line in [*lines]:
                line.drop()
        self._idle.clear()

    def keep(self, line: "_Line") -> None:
        """For the next question; those that nobody asked for too long go now."""
        idle = self._idle.setdefault(line.origin, {})
        idle[line] = None
        while (oldest := next(iter(idle))).since + self._keepalive < line.since:
            del idle[oldest]
            oldest.drop()

    def forget(self, line: "_Line") -> None:
        """It is closed."""
        if (idle := self._idle.get(line.origin)) is not None:
            idle.pop(line, None)
            if not idle:
                del self._idle[line.origin]

    def _kept(self, origin: Origin) -> "_Line | None":
        idle = self._idle.get(origin)
        while idle:
            line, _ = idle.popitem()
            if line.usable(self._keepalive):
                return line
            line.drop()
        return None

    async def _connected(self, origin: Origin, seconds: float) -> "_Line":
        loop = asyncio.get_running_loop()
        tls = self._tls or ssl.create_default_context() if origin.tls else None
        try:
            async with asyncio.timeout(seconds):
                _, line = await loop.create_connection(
                    lambda: _Line(self, origin, loop), origin.host, origin.port, ssl=tls
                )
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host that is no name
            raise NotConnected(repr(exc)) from exc
        return line


class _Line(asyncio.Protocol):
    """One connection, one exchange at a time; the Reply of the one under way."""

    def __init__(self, wire: Wire, origin: Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.origin, self.since = origin, 0.0
        self.status, self.headers = 0, Headers()
        self._wire, self._loop = wire, loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._writable: asyncio.Future[None] | None = None  # while the worker does not take more
        self._sender: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._parts: list[bytes] = []
        self._unread = self._head_bytes = 0
        self._asked = self._heard = self._headed = self._done = self._framed = self._paused = False
        self._again = False  # the connection may carry another exchange
        self._error: Exception | None = None

    @property
    def over(self) -> bool:
        return self._done and not self._parts

    # -- our side ------------------------------------------------------------------------------------------

    def usable(self, seconds: float = math.inf) -> bool:
        """It is open, and has been idle for at most so long."""
        return not self._transport.is_closing() and self._loop.time() - self.since <= seconds

    async def answer(self, head: bytes, question: Question) -> Self:
        """Once its head is here."""
        try:
            if question.connected is not None:
                question.connected()
            self.send(head, question)
            while not self._headed:
                if self._error is not None:
                    raise self._error
                await self._news()
        except BaseException:
            self.drop()
            raise
        return self

    def stale(self, question: Question) -> bool:
        """It ended as one does that was being closed when we asked: soon, without a byte (docs/adr/0026)."""
        late = self._loop.time() - self.since > question.connect_seconds
        return question.again and isinstance(question.body, bytes) and not (self._heard or late)

    def send(self, head: bytes, question: Question) -> None:
        self.status, self.headers, self._head_bytes = 0, [], 0
        self._heard, self.since = False, self._loop.time()
        self._headed = self._done = self._framed = self._again = False
        self._asked = True
        if isinstance(question.body, bytes):
            if len(question.body) <= _ONE_WRITE_BYTES:
                self._transport.write(head + question.body)
            else:
                self._transport.write(head)
                self._transport.write(question.body)
        else:
            self._transport.write(head)
            self._sender = self._loop.create_task(self._upload(question.body, question.length))
            self._sender.add_done_callback(self._uploaded)

    async def read(self) -> bytes:
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._done:
                return b""
            await self._news()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._unread = 0
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return data

    def close(self) -> None:
        if not self._asked:
            return
        if self._sender is not None and not self._sender.done():
            self._again = False
        if not (self._done and self._again) or self._error is not None or not self.usable():
            return self.drop()
        if self._transport.get_write_buffer_size() or self._paused:  # answered before it had heard us out
            return self.drop()
        self._asked = False
        self._parts.clear()
        self._unread = 0
        self.since = self._loop.time()
        self._wire.keep(self)

    def drop(self) -> None:
        self._asked = False
        self._error = None  # once raised it knows this frame and all that waited for us
        if self._sender is not None:
            self._sender.cancel()
        self._transport.abort()

    def _news(self) -> asyncio.Future[None]:
        self._waiter = self._loop.create_future()
        return self._waiter

    async def _upload(self, body: AsyncIterable[bytes], length: int | None) -> None:
        sent = 0
        async for part in body:
            if not part:
                continue
            sent += len(part)
            if length is not None and sent > length:
                raise Broken("the request body is longer than announced")
            self._transport.write(part if length is not None else b"%x\r\n%b\r\n" % (len(part), part))
            if self._writable is not None:
                await self._writable
        if length is None:
            self._transport.write(b"0\r\n\r\n")
        elif sent < length:
            raise Broken("the request body is shorter than announced")

    def _uploaded(self, sender: asyncio.Task[None]) -> None:
        if not sender.cancelled() and (exc := sender.exception()) is not None and not self._done:
            self._error = exc if isinstance(exc, Exception) else Broken(repr(exc))
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- asyncio's side ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._asked:  # nobody asked: an answer to what, nobody knows
            return self._transport.abort()
        self._heard = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._again = False
            if not self._done:
                self._error = Broken(f"not HTTP: {exc!r}")
        if self._unread > _MAX_UNREAD_BYTES and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire.forget(self)
        if self._headed and not self._framed and exc is None:
            self._done = True  # a body without a length ends with its connection
        elif not self._done and self._error is None:
            self._error = Broken(repr(exc) if exc else "the worker closed the connection")
        self._again = False
        self.resume_writing()
        self._wake()

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # -- httptools' side -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._done:
            raise Broken("a second answer to one question")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise Broken("endless headers")
        if not self._headed:  # else it is a trailer
            name = name.lower()
            self.headers.append((name, value))
            self._framed = self._framed or name == b"content-length" or name == b"transfer-encoding"

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self._headed = True
            self._framed = self._framed or self.status in (204, 304)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        if not self._headed:  # 1xx: the answer is still to come
            self.headers = []
            self._framed = False
            return
        self._done = True
        self._again = self._parser.should_keep_alive()


def _head(question: Question, origin: Origin) -> bytes:
    """Raises Unsendable."""
    target = origin.prefix + question.target
    lines = [b"%b %b HTTP/1.1" % (question.method, target), b"host: " + origin.name]
    lines += [name + b": " + value for name, value in question.headers]
    if isinstance(question.body, bytes):
        if question.body or question.method in _WITH_BODY:
            lines.append(b"content-length: %d" % len(question.body))
    elif question.length is not None:
        lines.append(b"content-length: %d" % question.length)
    else:
        lines.append(b"transfer-encoding: chunked")
    head = b"\r\n".join((*lines, b"", b""))
    ends = len(lines) + 1
    if head.count(b"\n") != ends or head.count(b"\r") != ends or b"\0" in head or _UNFIT.search(target):
        raise Unsendable
    return head
