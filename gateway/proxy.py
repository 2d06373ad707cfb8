"""One request to one worker, and its bytes back to one client.  Knows HTTP, not routing.

`Client` is our end of the caller's connection, `ask_worker` a context that holds a worker's answer, `relay`
moves bytes from one to the other.  Leaving the context closes the worker's connection, and a closed
connection is how vLLM learns to stop generating.  Nothing reaches the client before the worker's first body
byte, so until then another worker may be tried.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from starlette.types import Message, Receive, Scope, Send

from gateway.alarm import Alarm, Timer
from gateway.errors import (
    OPENAI,
    BadRequest,
    BodyTooLarge,
    Busy,
    Dialect,
    GatewayError,
    TookTooLong,
    TooSlow,
    Unreachable,
    Upstream,
)
from gateway.keepalive import COMMENT, Keepalive
from gateway.upload import Upload
from gateway.usage import TAIL_BYTES, USAGE, Usage, read_usage
from gateway.wire import Headers, NotConnected, Question, Reply, Transport, Unsendable, WireError

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
# Not the worker's business: who we are, how long our copy is, and our own switches.
_NOT_SENT = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-cairn-explain"}
# x-request-id: the envelope says it once, for every answer.
_NOT_RETURNED = _HOP_BY_HOP | {b"date", b"server", b"x-request-id"}
# Of a scope: the set of those whom the server calls when the connection is lost.
HANGUP = "cairn.hangup"
_MAX_HELD_BYTES = 1 << 20  # an event longer than this is passed on in pieces


class ClientGone(Exception):
    """The client hung up while we were still reading its request."""


class Client:
    """The caller's end of one exchange: remembers what it was told, and hears when it leaves."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, dialect: Dialect = OPENAI) -> None:
        self.headers: Headers = scope["headers"]
        self.method: str = scope.get("method", "POST")
        self.scheme: str = scope.get("scheme", "http")
        self.dialect = dialect
        self.status = 0  # of the answer, once started
        self.answered = False  # more than comments was sent: it is too late for another worker
        self.finished = False
        self.alarm: Alarm  # of the task that answers, while it is here()
        self.upload: Upload | None = None  # who reads the body, while the worker is already asked
        self.streams = False  # the answer is server-sent events
        self._keepalive: Keepalive | None = None
        self._receive = receive
        self._send = send
        self._named = dict(reversed(self.headers))  # of one that is repeated: the first
        self._hangup: set[Callable[[], None]] | None = scope.get("extensions", {}).get(HANGUP)

    def through(self, wrap: Callable[[Send], Send]) -> None:
        """All that the caller is told from now on goes through `wrap(send)`."""
        self._send = wrap(self._send)

    def header(self, name: bytes) -> bytes | None:
        return self._named.get(name)

    async def body(self, limit: int) -> bytes:
        """The whole request body.  Raises BodyTooLarge or ClientGone."""
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise BodyTooLarge(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message: Message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise BodyTooLarge(limit)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def part(self) -> tuple[bytes, bool]:
        """The next bytes of the request body, and whether more will come.  Raises ClientGone."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Of an answer.  Where comments went before it theirs stand."""
        await self.hush()
        self.answered = True
        if not self.status:
            await self._head(status, list(headers))

    async def _head(self, status: int, headers: Headers) -> None:
        self.status = status
        self.streams = _is_stream(headers)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def keep_alive(self, seconds: float) -> None:
        """Until the answer starts, a comment every so many seconds.  The first commits a stream: status 200
        and no header of the answer's own; what goes wrong later is an event in it."""
        self._keepalive = Keepalive(self._comment, seconds)

    async def hush(self) -> None:
        """No more comments.  Idempotent."""
        if self._keepalive is not None:
            keepalive, self._keepalive = self._keepalive, None
            await keepalive.stop()

    async def _comment(self) -> None:
        if not self.status:
            try:
                await self._head(
                    200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
                )
            except asyncio.CancelledError:  # behind an earlier answer that is not yet read: nothing was said
                self.status, self.streams = 0, False
                raise
        await self.write(COMMENT)

    def write(self, chunk: bytes) -> Awaitable[None]:
        return self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, chunk: bytes = b"") -> None:
        self.finished = True  # before the await: from here on a hang-up is the normal end
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def refuse(self, error: GatewayError) -> None:
        """Tell the client in whatever form is still possible: a JSON answer, an event in the stream, or, in
        the middle of a JSON answer, nothing: the server cuts the connection of an unfinished answer."""
        await self.hush()
        if not self.status:
            body = self.dialect.body(error)
            await self.start(error.status, [*error.headers(), (b"content-length", b"%d" % len(body))])
            await self.finish(body)
        elif self.streams and not self.finished:
            await self.finish(self.dialect.event(error))

    def here(self, seconds: float) -> "Presence":
        """`with client.here(…)`: what is awaited inside is interrupted, with ClientGone when the client
        leaves and with TookTooLong after `seconds`."""
        return Presence(self, seconds)

    def listens(self, left: Callable[[], None]) -> Callable[[], object]:
        """`left` is called when the client hangs up, until what is returned is called.

        Our own server calls it.  Any other tells of a hang-up only whoever waits in receive(), so somebody
        has to, also while a worker is silent; and an upload is read there."""
        if (hangup := self._hangup) is not None and self.upload is None:
            hangup.add(left)
            return lambda: hangup.discard(left)
        ears = asyncio.create_task(self._hung_up())
        ears.add_done_callback(lambda _: left())
        return ears.cancel

    async def _hung_up(self) -> None:
        with suppress(ClientGone):
            if self.upload is not None:
                await self.upload.listen()
            while (await self._receive())["type"] != "http.disconnect":
                pass


class Presence:
    """What Client.here() returns."""

    __slots__ = ("_alarm", "_client", "_deaf", "_seconds", "_timer")

    def __init__(self, client: Client, seconds: float) -> None:
        self._client, self._seconds = client, seconds

    def __enter__(self) -> None:
        self._alarm = self._client.alarm = Alarm()
        self._timer = Timer(self._alarm, self._seconds, partial(TookTooLong, self._seconds))
        self._deaf = self._client.listens(self._left)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._timer.off()
        self._alarm.off()
        self._deaf()
        if isinstance(exc, asyncio.CancelledError) and (reason := self._alarm.heard()):
            raise reason from None

    def _left(self) -> None:
        if not self._client.finished:
            self._alarm.ring(ClientGone)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long each phase may be silent, in seconds."""

    connect: float
    first_byte: float  # also the whole of an answer that is not streamed
    idle: float  # between two reads of an answer


@dataclass(slots=True)
class Answer:
    """A worker's answer with its first body bytes in hand."""

    status: int
    headers: Headers
    first: bytes
    rest: Reply
    timer: Timer  # rings when the worker is silent
    idle: float
    tail: bytes = b""  # of what was relayed, where the usage is

    @property
    def usage(self) -> Usage:
        """What the answer, once relayed, says it cost.  Searches the tail: ask once."""
        return read_usage(self.tail)


class ask_worker:
    """Sends `body` as it is and waits for the first bytes of the answer; leaving closes the connection.

    Raises Unreachable, Busy (it answered 503), TooSlow, or Upstream (it closed without a byte) on entry;
    TooSlow and Upstream out of the body of the `with` too.  One timer, moved along, guards every silence, and
    rings `alarm`.  `connected` and `again` are the Question's."""

    __slots__ = ("_alarm", "_patience", "_question", "_reply", "_timer", "_transport")

    def __init__(
        self,
        transport: Transport,
        alarm: Alarm,
        base_url: str,
        path: str,
        headers: Headers,
        body: bytes | Upload,
        patience: Patience,
        connected: Callable[[], None] | None = None,
        again: bool = False,
    ) -> None:
        length = body.length if isinstance(body, Upload) else None
        self._transport, self._alarm, self._patience = transport, alarm, patience
        sent = _forwarded(headers)
        self._question = Question(
            base_url, path.encode(), sent, body, length, b"POST", patience.connect, connected, again
        )
        self._reply: Reply | None = None

    async def __aenter__(self) -> Answer:
        timer = self._timer = Timer(self._alarm, self._patience.first_byte, TooSlow)
        try:
            reply = self._reply = await self._transport.ask(self._question)
            if reply.status == 503:
                raise Busy
            first = await reply.read()
        except BaseException as exc:
            self._left(exc)
            raise
        back = [header for header in reply.headers if header[0] not in _NOT_RETURNED]
        return Answer(reply.status, back, first, reply, timer, self._patience.idle)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._left(exc)

    def _left(self, exc: BaseException | None) -> None:
        """Lets go, and raises what `exc` means."""
        self._timer.off()
        if self._reply is not None:
            self._reply.close()
        if isinstance(exc, asyncio.CancelledError) and (reason := self._timer.heard()):
            raise reason from exc
        if isinstance(exc, NotConnected):
            raise Unreachable(exc) from exc
        if isinstance(exc, Unsendable):
            raise BadRequest("A header of this request cannot be forwarded.") from exc
        if isinstance(exc, WireError):
            raise Upstream(exc) from exc


async def relay(answer: Answer, client: Client, extra: Headers) -> None:
    """Everything from the worker to the client, `extra` headers added.  Streams are cut at event boundaries
    only, so that an error event can always follow.  Runs inside `ask_worker`, which maps what it raises."""
    await client.hush()
    if client.status and not _is_stream(answer.headers):
        await _as_event(answer, client)
        return
    await client.start(answer.status, [*answer.headers, *extra])
    if answer.rest.over:
        answer.tail = answer.first[-TAIL_BYTES:]
        await client.finish(answer.first)
        return
    answer.timer.again(answer.idle)
    # a task of its own: waking up one that awaits twelve coroutines deep costs more than passing on a chunk
    rest = _events(answer, client) if client.streams else _pieces(answer, client)
    await client.alarm.loop.create_task(rest)


async def _events(answer: Answer, client: Client) -> None:
    held, chunk = b"", answer.first
    while chunk:
        events, held = whole_events(held + chunk if held else chunk)
        over = answer.rest.over
        if over:
            events += held
        if b'"usage":' in events and USAGE.search(events):  # an event is whole, and so is what it says
            answer.tail = events[-TAIL_BYTES:]
        if over:
            await client.finish(events)
            return
        if events:
            await client.write(events)
        answer.timer.later(answer.idle)
        chunk = await answer.rest.read()
    await client.finish(held)


async def _pieces(answer: Answer, client: Client) -> None:
    chunk = answer.first
    while chunk:
        answer.tail = (answer.tail + chunk)[-TAIL_BYTES:]
        if answer.rest.over:
            break
        await client.write(chunk)
        answer.timer.later(answer.idle)
        chunk = await answer.rest.read()
    await client.finish(chunk)


async def _as_event(answer: Answer, client: Client) -> None:
    """An answer that is no stream, to a client that was promised one: an error, as a rule."""
    client.answered = True
    answer.timer.again(answer.idle)
    body, chunk = b"", answer.first
    while chunk and len(body) <= _MAX_HELD_BYTES:
        body += chunk
        answer.timer.later(answer.idle)
        chunk = await answer.rest.read()
    answer.tail = body[-TAIL_BYTES:]
    name = b"event: error\n" if answer.status >= 400 else b""
    await client.finish(name + b"data: " + b"\ndata: ".join(body.splitlines()) + b"\n\n")


def _is_stream(headers: Headers) -> bool:
    return any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)


def whole_events(data: bytes) -> tuple[bytes, bytes]:
    """`data` up to its last complete server-sent event, and the incomplete rest."""
    if data.endswith(b"\n\n"):
        return data, b""
    ends = ((end, data.rfind(end)) for end in (b"\n\n", b"\r\n\r\n"))
    cut = max((at + len(end) for end, at in ends if at >= 0), default=0)
    if not cut and len(data) > _MAX_HELD_BYTES:
        return data, b""
    return data[:cut], data[cut:]


def _forwarded(headers: Headers) -> Headers:
    dropped = _NOT_SENT
    for key, value in headers:
        if key == b"connection":
            dropped = dropped.union(token.strip().lower() for token in value.split(b","))
    # A name with "_" is the one with "-" to some servers: `content_length` would be a second opinion.
    return [header for header in headers if header[0] not in dropped and b"_" not in header[0]]
