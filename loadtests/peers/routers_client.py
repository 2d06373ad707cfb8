"""Open-loop arrivals over raw HTTP/1.1: a slow gateway is not spared by slower asking."""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from loadtests.peers.routers_trace import Ask

_END = b"0\r\n\r\n"  # of a chunked body


@dataclass
class Outcome:
    """What the client saw.  Times are seconds from when a request was due, not from when it was sent."""

    ttfts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # how late requests were sent: the client's own fault
    errors: list[str] = field(default_factory=list)

    def percentile(self, percent: int) -> float:
        """Of the times to the first token.  REQUIRES: at least two answers."""
        return statistics.quantiles(self.ttfts, n=100, method="inclusive")[percent - 1]


class _Talk(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answered: asyncio.Future[float] | None = None  # when the first byte of the body came
        self.ended: asyncio.Future[float] | None = None
        self._loop = asyncio.get_running_loop()
        self._head = self._tail = b""
        self.first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> "asyncio.Future[float]":
        """When the answer ended, on the loop's clock; `first` is then when its first event came."""
        assert self.transport is not None
        self._head = self._tail = b""
        self.first = 0.0
        self.ended = self._loop.create_future()
        self.transport.write(request)
        return self.ended

    def data_received(self, data: bytes) -> None:
        if self.ended is None or self.ended.done():
            return
        if not self.first:
            self._head += data
            if b"data: " not in self._head:
                if b"\r\n" in self._head and not self._head.startswith(b"HTTP/1.1 200"):
                    self.ended.set_exception(ConnectionError(repr(self._head[:120])))
                return
            self.first = self._loop.time()
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(_END):
            if b"[DONE]" in self._tail:
                self.ended.set_result(self._loop.time())
            else:
                self.ended.set_exception(ConnectionError("no [DONE]"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.ended is not None and not self.ended.done():
            self.ended.set_exception(ConnectionError(f"hung up: {exc}"))


class Client:
    """Asks one gateway, over as many connections as are busy at once."""

    def __init__(self, port: int, headers: str = "") -> None:
        """`headers` is a template of header lines, with {session}."""
        self._port, self._headers = port, headers
        self._idle: list[_Talk] = []
        self._made: list[_Talk] = []

    async def run(self, asks: Sequence[Ask], pace: float, warm: int, seconds: float) -> Outcome:
        """`pace` is trace seconds per second; the first `warm` requests are asked but not counted; what is
        not answered `seconds` after the last was due is an error."""
        outcome = Outcome()
        loop = asyncio.get_running_loop()
        began = loop.time() + 0.1
        tasks = []
        for number, ask in enumerate(asks):
            due = began + ask.at / pace
            if (pause := due - loop.time()) > 0:
                await asyncio.sleep(pause)
            tasks.append(asyncio.create_task(self._one(ask, due, outcome, counted=number >= warm)))
        _, left = await asyncio.wait(tasks, timeout=seconds)
        for task in left:
            task.cancel()
            outcome.errors.append("not answered")
        await asyncio.gather(*left, return_exceptions=True)
        for talk in self._made:
            if talk.transport is not None:
                talk.transport.abort()
        await asyncio.sleep(0)  # the loop closes the sockets
        return outcome

    async def _one(self, ask: Ask, due: float, outcome: Outcome, counted: bool) -> None:
        """A connection that failed is not used again."""
        loop = asyncio.get_running_loop()
        try:
            talk = await self._connected()
            sent = loop.time()
            ended = await talk.ask(self._request(ask))
        except OSError as exc:
            outcome.errors.append(str(exc))
            return
        self._idle.append(talk)
        if counted:
            outcome.ttfts.append(talk.first - due)
            outcome.ends.append(ended - due)
            outcome.late.append(sent - due)

    async def _connected(self) -> _Talk:
        while self._idle:
            talk = self._idle.pop()
            if talk.transport is not None and not talk.transport.is_closing():
                return talk
        _, talk = await asyncio.get_running_loop().create_connection(_Talk, "127.0.0.1", self._port)
        self._made.append(talk)
        return talk

    def _request(self, ask: Ask) -> bytes:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\n"
            f"content-type: application/json\r\n{self._headers.format(session=ask.session)}"
            f"content-length: {len(ask.body)}\r\n\r\n"
        )
        return head.encode() + ask.body
