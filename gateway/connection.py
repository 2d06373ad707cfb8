"""A caller's connection: uvicorn's, with bounds on what a caller may make us wait for and keep.

uvicorn and httptools refuse what could be read in two ways (Content-Length beside Transfer-Encoding, folded
headers, bare line feeds, NUL …), but bound neither the size of a request's head, nor the time it takes to
arrive, nor the number of callers, nor how long they may leave an answer unread.  Here: a head has
`MAX_HEAD_BYTES`; a request has `patience` seconds to be here whole, and one more for every `SLOWEST_BYTES` of
it; one that is answered early (413) is heard for `patience` more; beyond `most` connections requests are told
503, and beyond twice as many nobody is heard; who takes nothing of what waits for it, or of the last words,
for `deaf` seconds is cut off.  Every refusal has OpenAI's shape.

It also reads requests that offer to change to another protocol (`Upgrade: h2c`, as Java's HttpClient does) as
if they did not: RFC 9110 7.8 lets a server ignore the offer; httptools would drop the body.
"""

from asyncio import AbstractEventLoop, Protocol, TimerHandle, Transport
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.errors import BadRequest, Crowded, GatewayError, HeadTooLarge, RequestTooSlow
from gateway.proxy import HANGUP

MAX_HEAD_BYTES = 64 << 10
SLOWEST_BYTES = 16 << 10  # a second
DEAF = 1.25  # of `idle`: a worker whose answer nobody reads is let go before its caller
_HEADS = (b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4", b"HTTP/1.1 5")  # of answers; 1xx are sent at once
_OFFERS = frozenset({b"upgrade", b"connection", b"http2-settings"})


def connections(patience: float, most: int, idle: float) -> type[Protocol]:
    """What uvicorn.Config takes as `http`.  `patience` and `idle` in seconds; `most` connections of this
    process."""
    return cast("type[Protocol]", partial(Connection, patience=patience, most=most, deaf=DEAF * idle))


class Corked:
    """A transport that sends the head of an answer together with what is written next, if that comes in the
    same turn of the loop: uvicorn writes one after the other, and uvloop sends each at once.  Saves a system
    call, a packet, and the client's waking up for a head without a body."""

    __slots__ = ("_head", "_loop", "_transport", "abort", "is_closing", "write")

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self._transport, self._loop, self._head = transport, loop, b""
        self.abort, self.is_closing = transport.abort, transport.is_closing
        self.write: Callable[[bytes], None] = transport.write

    def cork(self) -> None:
        """A head is expected."""
        if not self._head:
            self.write = self._hold

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _hold(self, data: bytes) -> None:
        if data.startswith(_HEADS):
            self._head, self.write = data, self._join
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def _join(self, data: bytes) -> None:
        data, self._head, self.write = self._head + data, b"", self._transport.write
        self.write(data)

    def _flush(self) -> None:
        if self._head:
            self._join(b"")


class Connection(HttpToolsProtocol):
    """REQUIRES: uvicorn with ws="none"."""

    def __init__(self, *args: Any, patience: float, most: int, deaf: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience, self._most, self._deaf = patience, most, deaf
        self._refusal: GatewayError = BadRequest("This is no HTTP/1.1 request we can read in only one way.")
        self._owing, self._in_head = True, True  # the caller: the rest of a request; of its head
        self._answered = False  # though the caller is still owing
        self._offers = False  # another protocol
        self._crowded = False  # the room it came into
        self._began = self.loop.time()
        self._received = self._chunk = 0  # bytes of this request; in this read
        self._timer: TimerHandle | None = None  # runs while the caller owes us bytes
        self._unread: TimerHandle | None = None  # runs while it does not take ours
        self._hangup: set[Callable[[], None]] = set()  # who wants to know of it

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        self._corked = Corked(transport, self.loop)
        super().connection_made(cast(Transport, self._corked))
        self._watch()
        self._crowded = len(self.connections) > self._most
        if len(self.connections) > 2 * self._most:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._taken()
        super().connection_lost(exc)
        for left in [*self._hangup]:
            left()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._taken()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._untaken()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._chunk = len(data)
        self._received += self._chunk
        if (
            self._crowded
        ):  # only now: who has not spoken might miss the answer when its words meet a closed door
            self._turn_away(Crowded(self._most))
            return
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._turn_away(self._refusal)
            return
        if self._in_head and self._received > MAX_HEAD_BYTES:
            self._turn_away(HeadTooLarge(MAX_HEAD_BYTES))
        elif self._owing or (self.timeout_keep_alive_task is None and self.cycle.response_complete):
            self._watch()  # also who sends only empty lines between requests

    def _feed(self, data: bytes) -> None:
        """Raises HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            method = self.parser.get_method()
            if method == b"CONNECT":
                raise httptools.HttpParserError from exc
            self.parser = httptools.HttpRequestParser(self)
            lines = [b"%b: %b\r\n" % (k, v) for k, v in self.headers if k not in _OFFERS]
            head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self.url, b"".join(lines))
            self.parser.feed_data(head + data[exc.args[0] :])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._corked.cork()
        self.scope["extensions"] = {HANGUP: cast("dict[object, object]", self._hangup)}
        self._owing, self._in_head, self._answered = True, True, False
        self._began, self._received = self.loop.time(), self._chunk

    def on_headers_complete(self) -> None:
        if self._received > MAX_HEAD_BYTES:
            size = len(self.url) + sum(len(k) + len(v) + 4 for k, v in self.headers)
            if size > MAX_HEAD_BYTES:
                self._refusal = HeadTooLarge(MAX_HEAD_BYTES)
                raise self._refusal
        self._offers = self.parser.should_upgrade()
        if not self._offers:
            self._in_head = False
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._offers:
            self._owing = False
            self._unwatch()
            super().on_message_complete()
            if not self.pipeline:
                self.flow.resume_reading()  # or nobody would see the caller hang up

    def on_response_complete(self) -> None:
        another = self._in_head or self.pipeline  # what comes is not of the request just answered
        super().on_response_complete()
        if self.transport.is_closing():
            self._untaken()
        if self._owing and not another:
            self._answered, self._began = True, self.loop.time()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._patience, self._late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _untaken(self) -> None:
        """A closed connection, too, is there until what was said on it has been taken."""
        if self._unread is None:
            self._unread = self.loop.call_later(self._deaf, self.transport.abort)

    def _taken(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _late(self) -> None:
        """Was that all the time there is?"""
        now, self._timer = self.loop.time(), None
        credit = 0.0 if self._answered else self._received / SLOWEST_BYTES
        left = self._began + self._patience + credit - now
        if self.flow.read_paused:  # it is we who do not listen
            left = self._patience
        if left > 0:
            self._timer = self.loop.call_later(left, self._late)
        elif self._owing and self._received:
            self._turn_away(RequestTooSlow())
        else:  # nothing was asked
            self.transport.close()
            self._untaken()

    def _turn_away(self, error: GatewayError) -> None:
        """Say why, where nothing else is being said, and close."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            body = error.body()
            headers = [*error.headers(), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
            lines = [b"%b: %b\r\n" % header for header in headers]
            self.transport.write(b"".join((STATUS_LINE[error.status], *lines, b"\r\n", body)))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unwatch()
        self.transport.close()
        self._untaken()
