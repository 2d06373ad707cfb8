"""Our end of a worker's connection, against a server that says exactly what a test wants it to say."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from gateway.wire import Broken, NotConnected, Question, Unsendable, Wire
from tests.fakes import refusing_url

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Stage:
    """A server that plays a script to every connection, and counts them."""

    def __init__(self, script: Script) -> None:
        self.connections = self.left = 0
        self._script = script

    async def __aenter__(self) -> "Stage":
        self._server = await asyncio.start_server(self._greet, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.left += 1
            writer.close()


async def heard(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request with a length: its head and its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head, await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)


def saying(*parts: bytes, hang_up: bool = True) -> Script:
    """Each request is answered with these parts, one write each."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await heard(reader)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if hang_up:
                return

    return script


async def told(stage: Stage, **question: object) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    wire = Wire()
    reply = await wire.ask(Question(stage.url, b"/x", [], **question))  # type: ignore[arg-type]
    try:
        parts = []
        while part := await reply.read():
            parts.append(part)
        return reply.status, reply.headers, b"".join(parts)
    finally:
        reply.close()
        await wire.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        (OK,),
        tuple(bytes([byte]) for byte in OK),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"1\r\no\r\n1;x=y\r\nk\r\n0\r\nTrailer: 1\r\n\r\n",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\no", b"k"),  # a body that ends with its connection
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + OK,),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",),
    ],
    ids=["length", "byte-by-byte", "chunks", "until-closed", "interim", "1.0"],
)
def test_a_body_is_whole_however_it_is_framed(answer: tuple[bytes, ...]) -> None:
    async def scene() -> None:
        async with Stage(saying(*answer)) as stage:
            status, headers, body = await told(stage)
            assert (status, body) == (200, b"ok")
            assert not {b"link", b"trailer"} & {name for name, _ in headers}

    asyncio.run(scene())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
    ids=["silence", "short", "no-last-chunk", "both-framings", "two-lengths", "upgrade", "ssh", "endless"],
)
def test_what_is_no_complete_answer_is_broken(answer: bytes) -> None:
    async def scene() -> None:
        async with Stage(saying(answer)) as stage:
            with pytest.raises(Broken):
                await told(stage)

    asyncio.run(scene())


def test_what_came_before_the_break_is_still_told() -> None:
    async def scene() -> None:
        async with Stage(saying(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nfirst")) as stage:
            reply = await Wire().ask(Question(stage.url, b"/", []))
            assert await reply.read() == b"first"
            with pytest.raises(Broken):
                await reply.read()
            reply.close()

    asyncio.run(scene())


def test_headers_come_back_in_order_and_repeated() -> None:
    answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nSet-Cookie: b\r\ncontent-length: 0\r\n\r\n"

    async def scene() -> None:
        async with Stage(saying(answer)) as stage:
            _, headers, _ = await told(stage)
            assert headers == [(b"set-cookie", b"a"), (b"set-cookie", b"b"), (b"content-length", b"0")]

    asyncio.run(scene())


def test_a_connection_is_used_again_and_not_kept_too_long() -> None:
    async def scene() -> None:
        async with Stage(saying(OK, hang_up=False)) as stage:
            for keepalive, connections in ((60.0, 1), (0.0, 4)):
                wire = Wire(keepalive_seconds=keepalive)
                for _ in range(3):
                    reply = await wire.ask(Question(stage.url, b"/", [], b"x"))
                    assert await reply.read() == b"ok"
                    reply.close()
                    await asyncio.sleep(0.01)
                assert stage.connections == connections
                await wire.aclose()

    asyncio.run(scene())


@pytest.mark.parametrize("last", [b"connection: close\r\n", b""], ids=["said-so", "just-did"])
def test_a_connection_the_worker_closed_is_not_used_again(last: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + last + b"content-length: 2\r\n\r\nok"

    async def scene() -> None:
        async with Stage(saying(answer)) as stage:
            wire = Wire()
            for number in (1, 2):
                reply = await wire.ask(Question(stage.url, b"/", []))
                await reply.read()
                reply.close()
                while stage.left < number:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.01)  # our loop hears of it
            assert stage.connections == 2
            assert not wire._idle

    asyncio.run(scene())


def parts(*pieces: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    async def made() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await asyncio.sleep(0)
        if then is not None:
            raise then

    return made()


def closing(asked: list[int], reset: bool, first: bytes = b"") -> Script:
    """One answer to a connection; once the next question is on its way, `first`, and the end."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        asked.append(1)
        writer.write(OK)
        await (reader.readexactly(1) if reset else reader.readuntil(b"!"))
        writer.write(first)
        if reset:
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()

    return script


async def asked_twice(stage: Stage, body: bytes | AsyncIterator[bytes], **more: Any) -> bytes:
    """The answer to the second of two questions."""
    wire = Wire(keepalive_seconds=60.0)
    try:
        for sent in (b"x", body):
            question = Question(stage.url, b"/", [], sent, connect_seconds=30.0, **more)
            reply = await wire.ask(question)
            said = await reply.read()
            reply.close()
        return said
    finally:
        await wire.aclose()


BODY = b"x" * 50_000 + b"!"


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_what_met_a_closing_connection_goes_once_more_over_a_new_one(reset: bool) -> None:
    async def scene() -> None:
        asked: list[int] = []
        async with Stage(closing(asked, reset)) as stage:
            assert await asked_twice(stage, BODY, again=True) == b"ok"
            assert (stage.connections, len(asked)) == (2, 2)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("body", "again", "first", "reset"),
    [
        (BODY, False, b"", False),
        (BODY, False, b"", True),
        (lambda: parts(BODY), True, b"", False),
        (lambda: parts(BODY), True, b"", True),
        (BODY, True, b"H", False),
        (BODY, True, b"HTTP/1.1 100 Continue\r\n\r\n", False),
    ],
    ids=["may-not", "may-not-reset", "upload", "upload-reset", "a-byte", "interim"],
)
def test_nothing_else_goes_twice(body: Any, again: bool, first: bytes, reset: bool) -> None:
    async def scene() -> None:
        asked: list[int] = []
        async with Stage(closing(asked, reset, first)) as stage:
            with pytest.raises(Broken):
                await asked_twice(stage, body() if callable(body) else body, again=again)
            assert (stage.connections, len(asked)) == (1, 1)

    asyncio.run(scene())


def test_a_new_connection_that_ends_is_not_tried_again() -> None:
    async def scene() -> None:
        async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await heard(reader)

        async with Stage(slam) as stage:
            with pytest.raises(Broken):
                await told(stage, body=b"x", again=True)
            assert stage.connections == 1

    asyncio.run(scene())


def test_a_worker_that_died_of_a_question_is_not_unreachable() -> None:
    """Else the question would go on to the next worker, and no budget of retries would end that."""

    async def scene() -> None:
        async def mortal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await heard(reader)
            writer.write(OK)
            await heard(reader)
            stage._server.close()

        async with Stage(mortal) as stage:
            with pytest.raises(Broken):
                await asked_twice(stage, BODY, again=True)
            assert stage.connections == 1

    asyncio.run(scene())


def test_a_connection_that_ends_late_was_not_idle() -> None:
    async def scene() -> None:
        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await heard(reader)
            writer.write(OK)
            await heard(reader)
            await asyncio.sleep(0.05)

        async with Stage(slow) as stage:
            wire = Wire(keepalive_seconds=60.0)
            reply = await wire.ask(Question(stage.url, b"/", []))
            await reply.read()
            reply.close()
            with pytest.raises(Broken):
                await wire.ask(Question(stage.url, b"/", [], b"x", connect_seconds=0.01, again=True))
            assert stage.connections == 1
            await wire.aclose()

    asyncio.run(scene())


def test_an_answer_nobody_asked_for_is_given_to_nobody() -> None:
    async def scene() -> None:
        async with Stage(saying(OK + OK, hang_up=False)) as stage:
            for _ in range(2):
                assert (await told(stage))[2] == b"ok"
            wire = Wire()
            for _ in range(3):
                reply = await wire.ask(Question(stage.url, b"/", []))
                assert await reply.read() == b"ok"
                reply.close()
            assert stage.connections == 5  # none was used twice
            await wire.aclose()

    asyncio.run(scene())


def test_letting_go_in_mid_answer_closes_the_connection() -> None:
    async def scene() -> None:
        async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not (await heard(reader))[1]:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\nx")
            await reader.read()  # until they hang up

        async with Stage(endless) as stage:
            reply = await Wire().ask(Question(stage.url, b"/", []))
            reply.close()
            silent = asyncio.create_task(Wire().ask(Question(stage.url, b"/", [], b"x")))
            await asyncio.sleep(0.01)
            silent.cancel()
            while stage.connections < 2:
                await asyncio.sleep(0.001)
            while stage.left < stage.connections:
                await asyncio.sleep(0.001)

    asyncio.run(scene())


def test_a_reader_that_does_not_read_makes_the_worker_wait() -> None:
    size = 64 << 20

    async def scene() -> None:
        written = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            await heard(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size >> 16):
                writer.write(bytes(1 << 16))
                await writer.drain()
                written += 1 << 16

        async with Stage(flood) as stage:
            reply = await Wire().ask(Question(stage.url, b"/", []))
            before = -1
            while written != before:
                before = written
                await asyncio.sleep(0.1)
            assert written < size / 2
            total = 0
            while part := await reply.read():
                total += len(part)
            assert total == size
            reply.close()

    asyncio.run(scene())


def test_a_body_in_parts_goes_with_its_length_or_in_chunks() -> None:
    async def scene() -> None:
        bodies = []

        async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                end = b"0\r\n\r\n" if b"chunked" in head else b"world"
                bodies.append(await reader.readuntil(end))
                writer.write(OK)

        async with Stage(listening) as stage:
            assert (await told(stage, body=parts(b"hello ", b"", b"world"), length=11))[2] == b"ok"
            assert (await told(stage, body=parts(b"hello ", b"", b"world")))[2] == b"ok"
        assert bodies == [b"hello world", b"6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"]

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("body", "error"),
    [(parts(b"x", then=KeyError("k")), KeyError), (parts(b"xy"), Broken), (parts(b"xyz!"), Broken)],
    ids=["fails", "short", "long"],
)
def test_a_body_that_fails_on_its_way_ends_the_question(body: AsyncIterator[bytes], error: type) -> None:
    async def scene() -> None:
        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async with Stage(deaf) as stage:
            with pytest.raises(error):
                await told(stage, body=body, length=3)
            while stage.left < 1:
                await asyncio.sleep(0.001)

    asyncio.run(scene())


def test_an_answer_before_the_question_was_over_ends_the_connection() -> None:
    async def scene() -> None:
        never = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"x"
            await never.wait()

        async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK.replace(b"200 OK", b"413 No"))
            await reader.read()

        async with Stage(hasty) as stage:
            status, _, body = await told(stage, body=slow())
            assert (status, body) == (413, b"ok")
            while stage.left < 1:
                await asyncio.sleep(0.001)

    asyncio.run(scene())


def test_nobody_there_is_not_connected() -> None:
    for url in (refusing_url(), "http://no.such.host.invalid:1"):
        with pytest.raises(NotConnected):
            asyncio.run(Wire().ask(Question(url, b"/", [])))


@pytest.mark.parametrize(
    ("target", "header"),
    [(b"/a b", b"v"), (b"/a\r\nx: y", b"v"), (b"/", b"v\r\nx: y"), (b"/", b"v\n"), (b"/", b"\0")],
)
def test_what_would_read_as_something_else_is_not_sent(target: bytes, header: bytes) -> None:
    with pytest.raises(Unsendable):
        asyncio.run(Wire().ask(Question("http://127.0.0.1:1", target, [(b"h", header)])))
