"""One child process: started in its own session, waited for, logged, and stopped with all its descendants."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.launch.errors import LaunchError

LOG_BYTES = 32 << 20  # a longer log is moved aside, once
_TAIL_BYTES = 16 << 10
_STOP_POLL_SECONDS = 0.02
_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Spec:
    """How to start a part, and how to know that it is ready."""

    name: str
    argv: tuple[str, ...]
    log: Path
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""  # secrets travel here, not in argv; at most a pipe's worth (4 KiB)
    deadline_seconds: float = 60.0
    grace_seconds: float = 10.0
    note: str = ""  # shown while it starts
    hint: str = ""  # what usually helps when it does not start


class Guard:
    """A tiny process that stops our children if we are killed without a chance to do it ourselves."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.launch.guard"], stdin=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin

    def add(self, group: int) -> None:
        self._say(f"+{group}\n")

    def remove(self, group: int) -> None:
        self._say(f"-{group}\n")

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed it: we still stop our children ourselves
            self._pipe.write(line.encode())
            self._pipe.flush()

    def close(self) -> None:
        """Idempotent.  Whatever was not removed is stopped by the guard."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        self._process.wait()


class Child:
    """A part of the stack.  start() may be called again after the process has died."""

    def __init__(self, spec: Spec, guard: Guard | None = None) -> None:
        self.spec = spec
        self.started_at = 0.0
        self._guard = guard
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """0 before start."""
        return self._process.pid if self._process else 0

    @property
    def seconds(self) -> float:
        """Since the last start."""
        return time.monotonic() - self.started_at

    def start(self) -> None:
        """Raises LaunchError when the program cannot be run at all."""
        spec = self.spec
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with open(spec.log, "ab") as log:  # append, so that truncating it in rotate() is safe
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} starting {spec.name}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    spec.argv,
                    stdin=subprocess.PIPE if spec.stdin else subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(spec.env) or None,
                    start_new_session=True,
                )
            except OSError as exc:
                raise LaunchError(f"{spec.name} cannot be run: {exc}", spec.log) from exc
        self._process = process
        self.started_at = time.monotonic()
        if self._guard:
            self._guard.add(process.pid)
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it died before reading; the exit code tells
                process.stdin.write(spec.stdin)
                process.stdin.close()

    def exit_code(self) -> int | None:
        """None while it runs (or was never started)."""
        return self._process.poll() if self._process else None

    def ready(self) -> bool:
        return self.exit_code() is None and self.spec.ready()

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        try:
            with open(self.spec.log, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def failure(self) -> LaunchError:
        """Why it is not running or not ready, as a sentence with the log beside it."""
        code = self.exit_code()
        if code is None:
            what = f"{self.name} did not become ready within {self.spec.deadline_seconds:.0f} s"
        else:
            what = f"{self.name} {died(code)}"
        if self.spec.hint:
            what += f"; {self.spec.hint}"
        return LaunchError(what, self.spec.log, self.tail())

    def rotate(self) -> None:
        """Keep the log bounded: copy aside and truncate in place (the child appends)."""
        try:
            if self.spec.log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.spec.log, self.spec.log.with_suffix(".log.1"))
                os.truncate(self.spec.log, 0)
        except FileNotFoundError:  # somebody tidied up
            return

    def terminate(self) -> None:
        """Ask it to stop; does not wait."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def stop(self, grace_seconds: float | None = None, hurried: Callable[[], bool] = lambda: False) -> None:
        """Ask, wait (until `hurried`), then kill whatever is left of its session.  Idempotent."""
        if self._process is None:
            return
        grace = self.spec.grace_seconds if grace_seconds is None else grace_seconds
        self.terminate()
        until = time.monotonic() + grace
        while self._process.poll() is None and time.monotonic() < until and not hurried():
            time.sleep(_STOP_POLL_SECONDS)
        kill_group(self._process.pid)
        self._process.wait()
        wait_until_gone(self._process.pid, _KILL_SECONDS)
        if self._guard:
            self._guard.remove(self._process.pid)


def died(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def kill_group(group: int, sig: int = signal.SIGKILL) -> None:
    """Signal every process of a group; nobody left is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, sig)


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def wait_until_gone(group: int, seconds: float) -> None:
    """Until no process of the group is left, at most `seconds`."""
    end = time.monotonic() + seconds
    while group_alive(group) and time.monotonic() <= end:
        time.sleep(_POLL_SECONDS)


def stop_all(
    children: Sequence[Child],
    grace_seconds: float | None = None,
    hurried: Callable[[], bool] = lambda: False,
) -> None:
    """Stop several at once: all are asked first, so their graces overlap."""
    for child in children:
        child.terminate()
    for child in children:
        child.stop(grace_seconds, hurried)


def wait_ready(
    children: Iterable[Child],
    on_ready: Callable[[Child], None],
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Wait until all are ready; False when asked to stop meanwhile.

    Raises LaunchError when one dies or is late.
    """
    waiting = list(children)
    while waiting:
        for child in list(waiting):
            if child.exit_code() is not None:
                raise child.failure()
            if child.ready():
                on_ready(child)
                waiting.remove(child)
            elif child.seconds > child.spec.deadline_seconds:
                raise child.failure()
        if stopping():
            return False
        time.sleep(_POLL_SECONDS)
    return True
