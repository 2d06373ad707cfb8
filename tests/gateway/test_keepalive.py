import asyncio
from typing import Any

from gateway.keepalive import Keepalive
from gateway.proxy import Client


def test_no_task_exists_before_the_first_comment_is_due() -> None:
    async def test() -> None:
        said: list[int] = []

        async def say() -> None:
            said.append(1)

        keepalive = Keepalive(say, 60)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        await keepalive.stop()
        assert said == []

    asyncio.run(test())


def test_after_stop_nothing_is_said() -> None:
    async def test() -> None:
        said: list[int] = []
        twice = asyncio.Event()

        async def say() -> None:
            said.append(1)
            if len(said) == 2:
                twice.set()

        keepalive = Keepalive(say, 0.001)
        await asyncio.wait_for(twice.wait(), 30)
        await keepalive.stop()
        before = len(said)
        await asyncio.sleep(0.05)
        assert len(said) == before
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(test())


def test_a_client_that_does_not_read_does_not_hold_up_the_end() -> None:
    async def test() -> None:
        blocked = asyncio.Event()

        async def say() -> None:
            blocked.set()
            await asyncio.Event().wait()

        keepalive = Keepalive(say, 0.001)
        await asyncio.wait_for(blocked.wait(), 30)
        await asyncio.wait_for(keepalive.stop(), 30)

    asyncio.run(test())


def test_a_head_that_could_not_be_said_yet_is_said_with_the_answer() -> None:
    async def test() -> None:
        blocked, said = asyncio.Event(), list[Any]()

        async def send(message: Any) -> None:
            if not blocked.is_set():  # an earlier answer on this connection is still unread
                blocked.set()
                await asyncio.Event().wait()
            said.append(message["type"])

        client = Client({"headers": []}, None, send)  # type: ignore[arg-type]
        client.keep_alive(0.001)
        await asyncio.wait_for(blocked.wait(), 30)
        await client.start(200, [(b"content-type", b"text/event-stream")])
        await client.finish(b"data: [DONE]\n\n")
        assert said == ["http.response.start", "http.response.body"]

    asyncio.run(test())
