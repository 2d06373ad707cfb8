"""An alarm interrupts what its task awaits, once, and says why; a cancellation by others stays one."""

import asyncio

import pytest

from gateway.alarm import Alarm, Timer


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
        Timer(alarm, 0.01, Late)
        assert isinstance(await interrupted(alarm), Late)
        await asyncio.sleep(0)  # nothing of it is left in the task
        assert asyncio.current_task().cancelling() == 0

    asyncio.run(body())


def test_it_rings_at_once_for_whoever_says_so_and_the_first_reason_counts():
    async def body() -> None:
        alarm = Alarm()
        timer = Timer(alarm, 60, Late)
        asyncio.get_running_loop().call_soon(alarm.ring, Gone)
        asyncio.get_running_loop().call_soon(alarm.ring, Late)
        assert isinstance(await interrupted(alarm), Gone)
        timer.off()

    asyncio.run(body())


def test_a_timer_rings_when_it_was_last_told_to():
    async def body() -> None:
        alarm = Alarm()
        timer = Timer(alarm, 60, Late)
        timer.again(0.05)
        timer.later(60)
        assert await interrupted(alarm, seconds=0.3) is None
        alarm = Alarm()
        timer = Timer(alarm, 60, Late)
        timer.again(0.01)
        assert isinstance(await interrupted(alarm), Late)
        timer.off()

    asyncio.run(body())


def test_a_timer_hears_only_what_it_rang_itself():
    async def body() -> None:
        alarm = Alarm()
        timer = Timer(alarm, 60, Late)
        asyncio.get_running_loop().call_soon(alarm.ring, Gone)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)
        assert timer.heard() is None
        assert isinstance(alarm.heard(), Gone)
        timer.off()

    asyncio.run(body())


def test_once_off_it_does_not_ring():
    async def body() -> None:
        alarm = Alarm()
        timer = Timer(alarm, 0.01, Late)
        alarm.off()
        alarm.ring(Gone)
        await asyncio.sleep(0.05)
        assert alarm.heard() is None
        timer.off()

    asyncio.run(body())


def test_a_cancellation_by_others_passes_through():
    async def work() -> None:
        alarm = Alarm()
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


def test_of_a_reason_and_a_cancellation_by_others_nothing_is_left_for_the_next_who_asks():
    async def work() -> None:
        alarm = Alarm()
        timer = Timer(alarm, 60, Late)
        asyncio.get_running_loop().call_soon(alarm.ring, Late)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            assert timer.heard() is None  # somebody else, too
            assert alarm.heard() is None
            raise
        finally:
            timer.off()

    async def body() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
