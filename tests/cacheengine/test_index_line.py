"""The line to a server of the index: whatever is said on it, it costs that line and never the next."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
import redis
import redis.asyncio

from cacheengine.errors import IndexDown
from cacheengine.index_line import Line, Node
from cacheengine.index_reader import IndexReader
from tests.cacheengine.index_rig import NS, PROMPT
from tests.conftest import ValkeyServer

Answer = Callable[[int, bytes], bytes]  # which connection, verb → bytes on the wire


@contextlib.asynccontextmanager
async def impostor(answer: Answer) -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """A server that says what it likes; yields its URL and the connections it took."""
    taken: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        which = len(taken)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError):
            while True:
                words = []
                for _ in range(int((await reader.readline())[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                writer.write(answer(which, words[0]))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", taken
    finally:
        server.close()


def sane(which: int, verb: bytes) -> bytes:
    return {b"SCRIPT": b"$40\r\n" + b"a" * 40 + b"\r\n", b"EVALSHA": b"*0\r\n"}.get(verb, b"+OK\r\n")


async def answered(reader: IndexReader) -> None:
    """Return at the first look-up that is answered."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(IndexDown):
                assert await reader.holders(NS, PROMPT) == {}
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("extra", [b"+OK\r\n", b"-ERR going away\r\n", b":abc\r\n", b"!?\r\n"])
def test_a_reply_nobody_asked_for_costs_that_connection_only(extra: bytes) -> None:
    async def main() -> None:
        async with impostor(lambda n, verb: sane(n, verb) + extra * (n == 1)) as (url, taken):
            reader = IndexReader(url, deadline_ms=1000)
            await reader.open()
            async with asyncio.timeout(20):
                while len(taken) < 2:
                    await asyncio.sleep(0.01)
            await answered(reader)
            await reader.close()

    asyncio.run(main())


def test_an_answer_of_the_wrong_kind_to_the_greeting_is_another_try() -> None:
    async def main() -> None:
        async with impostor(lambda n, verb: b"*0\r\n" if n == 1 else sane(n, verb)) as (url, _):
            reader = IndexReader(url, deadline_ms=1000)
            await reader.open()
            await answered(reader)
            await reader.close()

    asyncio.run(main())


def test_who_waits_while_the_line_breaks_hears_of_it_as_of_any_lost_connection(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url(valkey.unix_url, protocol=2)
        connection = client.connection_pool.make_connection()
        await connection.connect()

        async def stumble(**_: object) -> None:
            await asyncio.sleep(0.01)
            raise KeyError("a bug of the parser")

        monkeypatch.setattr(connection, "read_response", stumble)
        line = Line(connection)
        with pytest.raises(redis.ConnectionError):
            await line.ask("PING")
        assert line.broken.is_set()
        await line.close()

    asyncio.run(main())


def test_a_connection_that_hung_up_is_not_dialled_again_under_its_reader(valkey: ValkeyServer) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url(valkey.unix_url, protocol=2)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        line = Line(connection)
        assert await line.ask("PING") == b"PONG"
        await connection.disconnect(nowait=True)  # as redis-py does when a write is cancelled half way
        with pytest.raises(redis.ConnectionError):
            await line.ask("PING")
        assert not connection.is_connected
        assert line.broken.is_set()  # its node makes a new one at once
        await line.close()

    asyncio.run(main())


def test_a_node_closes_whatever_it_was_doing(valkey: ValkeyServer) -> None:
    async def main() -> None:
        for turns in range(12):
            client = redis.asyncio.Redis.from_url(valkey.unix_url, protocol=2)
            changed = asyncio.Event()
            node = Node(client, "return {}", changed)
            async with asyncio.timeout(20):
                while not node.up:
                    await changed.wait()
                    changed.clear()
                assert node._line is not None
                node._line.broken.set()
                for _ in range(turns):
                    await asyncio.sleep(0)
                await node.close()
            assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("cairn-index")]

    asyncio.run(main())
