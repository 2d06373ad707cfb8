import asyncio

from gateway.keepalive import Keepalive


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
