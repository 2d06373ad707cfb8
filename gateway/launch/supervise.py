"""After the start: notice a part that dies, say so, bring it back with growing pauses, give up in the end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.launch.errors import LaunchError
from gateway.launch.processes import Child, died

POLL_SECONDS = 0.2
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
MAX_FAILURES = 6  # in a row; then the part stays down
STEADY_SECONDS = 300.0  # running this long forgives earlier failures


def pause_after(failures: int) -> float | None:
    """Seconds to wait before the next start; None means give up."""
    if failures > MAX_FAILURES:
        return None
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1))


@dataclass
class _Watch:
    """One part and what has happened to it."""

    child: Child
    failures: int = 0
    start_at: float | None = None  # when the next start is due; None while it runs or has been given up
    starting: bool = False  # restarted, not ready yet
    given_up: bool = False


class Supervisor:
    """Keeps the parts of one stack running.  Single threaded: tick() does one round."""

    def __init__(
        self,
        children: Sequence[Child],
        say: Callable[[str], None],
        stopping: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watches = [_Watch(child) for child in children]
        self._say = say
        self._stopping = stopping
        self._clock = clock

    def run(self) -> None:
        """Until told to stop.  Raises LaunchError when nothing is left that could serve."""
        while not self._stopping():
            self.tick()
            time.sleep(POLL_SECONDS)

    def tick(self) -> None:
        for watch in self._watches:
            self._look(watch)
        self._is_anyone_left()

    def _look(self, watch: _Watch) -> None:
        child = watch.child
        if watch.given_up:
            return
        if watch.start_at is not None:
            if self._clock() >= watch.start_at:
                self._start(watch)
            return
        child.rotate()
        if (code := child.exit_code()) is not None:
            self._fell(watch, died(code))
        elif watch.starting:
            self._wait(watch)
        elif watch.failures and child.seconds > STEADY_SECONDS:
            watch.failures = 0

    def _start(self, watch: _Watch) -> None:
        watch.start_at = None
        watch.starting = True
        try:
            watch.child.start()
        except LaunchError as exc:
            self._fell(watch, str(exc))

    def _wait(self, watch: _Watch) -> None:
        if watch.child.ready():
            watch.starting = False
            self._say(f"{watch.child.name} is back after {watch.child.seconds:.0f} s")
        elif watch.child.seconds > watch.child.spec.deadline_seconds:
            self._fell(watch, "did not become ready in time")

    def _fell(self, watch: _Watch, how: str) -> None:
        child = watch.child
        child.stop(0.0)  # its descendants must not outlive it
        watch.starting = False
        watch.failures += 1
        pause = pause_after(watch.failures)
        if pause is None:
            watch.given_up = True
            self._say(f"{child.name} {how}, {watch.failures} times in a row: left down, see {child.spec.log}")
        else:
            watch.start_at = self._clock() + pause
            self._say(f"{child.name} {how}; starting it again in {pause:.0f} s (log: {child.spec.log})")

    def _is_anyone_left(self) -> None:
        """Without its gateway, or without any worker, a stack serves nobody."""
        workers = [watch for watch in self._watches if watch.child.name not in ("gateway", "valkey")]
        gateways = [watch for watch in self._watches if watch.child.name == "gateway"]
        for group, what in ((workers, "every worker"), (gateways, "the gateway")):
            if group and all(watch.given_up for watch in group):
                last = group[-1].child
                raise LaunchError(f"{what} keeps failing", last.spec.log, last.tail())
