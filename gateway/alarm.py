"""Interrupts what a task awaits, for a reason.

asyncio.timeout() knows one reason; a request has three (its caller hung up, its worker is silent, it lasts
too long) and no time for a context manager for each.
"""

import asyncio
from collections.abc import Callable

Reason = Callable[[], Exception]  # makes what is to be raised


class Alarm:
    """Of the task it is made in.  REQUIRES: off() in a `finally`.

    Who catches the CancelledError asks heard(): an exception means that it was this alarm alone, and has to
    be raised instead; None, that somebody else cancelled the task, and it has to end."""

    __slots__ = ("_off", "_task", "loop", "rung")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self.loop = task, task.get_loop()
        self.rung: Reason | None = None
        self._off = False

    def ring(self, reason: Reason) -> None:
        """Now.  Only the first reason counts."""
        if self.rung is None and not self._off:
            self.rung = reason
            self._task.cancel()

    def heard(self) -> Exception | None:
        """Why the task was cancelled, if it was by this alarm alone.  Says it once."""
        reason, self.rung = self.rung, None
        return reason() if reason is not None and not self._task.uncancel() else None

    def off(self) -> None:
        """It will not ring any more."""
        self._off = True


class Timer:
    """Rings an alarm after some time.  REQUIRES: off() in a `finally`."""

    __slots__ = ("_alarm", "_at", "_handle", "_reason")

    def __init__(self, alarm: Alarm, seconds: float, reason: Reason) -> None:
        self._alarm, self._reason = alarm, reason
        self._at = alarm.loop.time() + seconds
        self._handle = alarm.loop.call_at(self._at, self._look)

    def again(self, seconds: float) -> None:
        """From now."""
        self.off()
        self.later(seconds)
        self._handle = self._alarm.loop.call_at(self._at, self._look)

    def later(self, seconds: float) -> None:
        """The same for next to nothing.  REQUIRES: that is not sooner than it was."""
        self._at = self._alarm.loop.time() + seconds

    def heard(self) -> Exception | None:
        """As the alarm's, if it was this timer that rang it."""
        return self._alarm.heard() if self._alarm.rung is self._reason else None

    def off(self) -> None:
        self._handle.cancel()

    def _look(self) -> None:
        """It was moved, or this is the time."""
        if self._alarm.loop.time() < self._at:
            self._handle = self._alarm.loop.call_at(self._at, self._look)
        else:
            self._alarm.ring(self._reason)
