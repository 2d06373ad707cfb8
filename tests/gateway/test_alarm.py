"""An alarm interrupts what its task awaits, once, and says why; a cancellation by others stays one."""

import asyncio

import pytest

from gateway.alarm import Alarm


class Late(Exception):
    pass


class Gone(Exception):
    pass


async def interrupted(alarm: Alarm, seconds: float = 60.0) -> Exception | None:
    """Awaits until something happens; why, if it was the alarm."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        if reason := alarm.heard():
            return reason
        raise
    finally:
        alarm.off()
    return None


def test_it_rings_when_the_time_is_over():
    async def body() -> None:
        alarm = Alarm()
        alarm.ring_after(0.01, Late)
        assert isinstance(await interrupted(alarm), Late)
        await asyncio.sleep(0)  # nothing of it is left in the task
        assert asyncio.current_task().cancelling() == 0

    asyncio.run(body())


def test_it_rings_at_once_for_whoever_says_so_and_the_first_reason_counts():
    async def body() -> None:
        alarm = Alarm()
        alarm.ring_after(60, Late)
        asyncio.get_running_loop().call_soon(alarm.ring, Gone)
        asyncio.get_running_loop().call_soon(alarm.ring, Late)
        assert isinstance(await interrupted(alarm), Gone)

    asyncio.run(body())


@pytest.mark.parametrize("moved_to", [0.02, 60.0], ids=["sooner", "later"])
def test_the_last_time_said_counts(moved_to):
    async def body() -> None:
        alarm = Alarm()
        alarm.ring_after(0.1 if moved_to > 1 else 60.0, Gone)
        alarm.ring_after(moved_to, Late)
        reason = await interrupted(alarm, seconds=0.3 if moved_to > 1 else 60.0)
        assert reason is None if moved_to > 1 else isinstance(reason, Late)

    asyncio.run(body())


def test_once_off_it_does_not_ring():
    async def body() -> None:
        alarm = Alarm()
        alarm.ring_after(0.01, Late)
        alarm.off()
        alarm.ring(Gone)
        await asyncio.sleep(0.05)
        assert alarm.heard() is None

    asyncio.run(body())


def test_a_cancellation_by_others_passes_through():
    async def work() -> None:
        alarm = Alarm()
        alarm.ring_after(60, Late)
        assert await interrupted(alarm) is None

    async def body() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())


def test_a_cancellation_by_others_in_the_same_moment_is_not_swallowed():
    async def work() -> None:
        alarm = Alarm()
        asyncio.get_running_loop().call_soon(alarm.ring, Late)
        await interrupted(alarm)

    async def body() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())


def test_of_two_alarms_at_once_the_outer_one_is_heard():
    async def body() -> None:
        outer, inner = Alarm(), Alarm()
        asyncio.get_running_loop().call_soon(inner.ring, Late)
        asyncio.get_running_loop().call_soon(outer.ring, Gone)
        with pytest.raises(asyncio.CancelledError):
            await interrupted(inner)
        assert isinstance(outer.heard(), Gone)
        outer.off()

    asyncio.run(body())
