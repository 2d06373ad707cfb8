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

    __slots__ = ("_at", "_handle", "_late", "_loop", "_off", "_rung", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._rung: Reason | None = None
        self._off = False
        self._handle: asyncio.TimerHandle | None = None
        self._at = 0.0
        self._late: Reason = TimeoutError

    def ring(self, reason: Reason) -> None:
        """Now.  Only the first reason counts."""
        if self._rung is None and not self._off:
            self._rung = reason
            self._task.cancel()

    def ring_after(self, seconds: float, reason: Reason) -> None:
        """Instead of any time said before."""
        self._late, self._at = reason, self._loop.time() + seconds
        if self._handle is not None and self._handle.when() > self._at:
            self._handle.cancel()
            self._handle = None
        if self._handle is None:
            self._handle = self._loop.call_at(self._at, self._look)

    def later(self, seconds: float) -> None:
        """For the same reason.  REQUIRES: ring_after() was called, and not for later than this."""
        self._at = self._loop.time() + seconds

    def heard(self) -> Exception | None:
        """Why the task was cancelled, if it was by this alarm alone."""
        return self._rung() if self._rung is not None and not self._task.uncancel() else None

    def off(self) -> None:
        """It will not ring any more.  Idempotent."""
        self._off = True
        if self._handle is not None:
            self._handle.cancel()

    def _look(self) -> None:
        """It was moved, or this is the time."""
        self._handle = None
        if self._loop.time() < self._at:
            self._handle = self._loop.call_at(self._at, self._look)
        else:
            self.ring(self._late)
