"""Run as a program: the gateway.  `python -m gateway.launch.serve '{"port": 8000}'`

The argument is a JSON object of GatewayConfig fields (plus `config`, a YAML file); the environment fills
the rest.  This process opens the listening sockets and serves nobody: it starts `processes` that do
(gateway/launch/serving.py), starts again what dies, and keeps the sockets open throughout, so that a caller
may wait for a moment but is never refused.  Each process has a socket of its own (SO_REUSEPORT): the kernel
spreads connections over them.

SIGTERM, SIGINT  open answers may finish for shutdown_grace_seconds; a second one ends them now
SIGHUP           processes with the configuration as it is now take over, and those before them finish what
                 they are answering; a configuration that does not work is refused with a line
"""

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheengine.config import ConfigError
from gateway import logs
from gateway.config import GatewayConfig
from gateway.launch.supervise import MAX_FAILURES, STEADY_SECONDS, pause_after
from router.shared_load import SharedLoadBoard

log = logging.getLogger(__name__)

NUMBERS = 64  # processes at once, those that finish answers of an earlier configuration too
START_SECONDS = 60.0
_POLL_SECONDS = 0.1
_LATE_SECONDS = 5.0  # beyond its grace


@dataclass(eq=False)
class Hand:
    """A process that serves, or is about to."""

    process: subprocess.Popen[bytes]
    place: int  # among its crew
    number: int  # on the load board
    listening: int  # our end of the pipe on which it says that it is ready
    began: float = field(default_factory=time.monotonic)
    ready: bool = False

    def look(self) -> None:
        if not self.ready and select.select([self.listening], [], [], 0)[0]:
            self.ready = bool(os.read(self.listening, 1))

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def tell(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        os.close(self.listening)


class Crew:
    """Everything that runs for one gateway.  Raises OSError when it cannot listen."""

    def __init__(self, flags: dict[str, Any], config: GatewayConfig) -> None:
        self._flags, self._config = flags, config
        self._listeners = listeners(config.host, config.port, config.processes)
        if config.admin_port:
            _admin_port_is_free(config)
        self.address = self._listeners[0].getsockname()[:2]
        self._folder = Path(tempfile.mkdtemp(prefix="cairn-"))
        SharedLoadBoard.create(self._folder / "board", NUMBERS)
        self._life = os.pipe()
        self._hands: list[Hand] = []  # who serve
        self._coming: list[Hand] = []  # who will, when all of them are ready
        self._coming_config = config
        self._going: list[Hand] = []
        self._failures: dict[int, int] = {}  # by place
        self._again: dict[int, float] = {}  # by place: when to start it
        self._signals: list[int] = []

    def run(self) -> int:
        """Until told to stop; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self._signals.append(number))
        log.info("listening on %s:%d", *self.address)
        try:
            self._come(self._config)
            while not (self._stopping() or (self._coming and not self._hands and self._failed())):
                self._tick()
                time.sleep(_POLL_SECONDS)
            return self._stop()
        finally:
            for hand in (*self._hands, *self._coming, *self._going):
                hand.process.kill()
                hand.process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _stopping(self) -> bool:
        return bool({signal.SIGTERM, signal.SIGINT} & set(self._signals))

    def _failed(self) -> bool:
        """Of the first crew: its process has said why."""
        return any(hand.dead for hand in self._coming)

    def _tick(self) -> None:
        if signal.SIGHUP in self._signals and not self._coming:
            self._signals = [number for number in self._signals if number != signal.SIGHUP]
            self._reload()
        for hand in (*self._hands, *self._coming):
            hand.look()
        self._bury()
        if self._coming:
            self._take_over()
        for place, at in [*self._again.items()]:
            if time.monotonic() >= at:
                del self._again[place]
                self._hands.append(self._start(place, self._config))

    # -- a crew comes ---------------------------------------------------------------------------------------

    def _reload(self) -> None:
        try:
            flags = dict(self._flags)
            config = GatewayConfig.load(flags.pop("config", None), **flags)
        except ConfigError as exc:
            return log.warning(f"the configuration stays as it was: {' '.join(str(exc).split())}")
        if (config.host, config.port) != (self._config.host, self._config.port):
            return log.warning("the configuration stays as it was: host and port need a restart")
        self._come(config)

    def _come(self, config: GatewayConfig) -> None:
        host, port = self.address
        while len(self._listeners) < config.processes:
            self._listeners.append(listener(host, port))
        self._coming_config = config
        for place in range(config.processes):
            self._coming.append(self._start(place, config))

    def _take_over(self) -> None:
        late = time.monotonic() - self._coming[0].began > START_SECONDS
        if any(hand.dead for hand in self._coming) or late:
            log.warning("the configuration stays as it was: with the new one the gateway does not start")
            for hand in self._coming:
                hand.process.kill()
            self._going += self._coming
            self._coming = []
        elif all(hand.ready for hand in self._coming):
            for hand in self._hands:
                hand.tell(signal.SIGUSR1)
            log.info("reloaded" if self._hands else "every process serves")
            self._going += self._hands
            self._hands, self._coming, self._config = self._coming, [], self._coming_config
            self._failures.clear()
            self._again.clear()

    def _start(self, place: int, config: GatewayConfig) -> Hand:
        several = config.processes > 1
        everyone = (*self._hands, *self._coming, *self._going)
        number = next(n for n in range(NUMBERS) if n not in {hand.number for hand in everyone})
        ours, theirs = os.pipe()
        mine = self._listeners[place :: config.processes]
        told = {
            "flags": self._flags, "listeners": [each.fileno() for each in mine], "life": self._life[0],
            "ready": theirs, "board": str(self._folder / "board") if several else "", "number": number,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.launch.serving", json.dumps(told)],
            pass_fds=[*told["listeners"], self._life[0], theirs],  # type: ignore[misc]
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        return Hand(process, place, number, ours)

    # -- and goes -------------------------------------------------------------------------------------------

    def _bury(self) -> None:
        for hand in [hand for hand in self._going if hand.dead]:
            self._going.remove(hand)
            hand.close()
        for hand in [hand for hand in self._hands if hand.dead]:
            self._hands.remove(hand)
            hand.close()
            steady = time.monotonic() - hand.began > STEADY_SECONDS
            failures = self._failures[hand.place] = 1 if steady else self._failures.get(hand.place, 0) + 1
            pause = pause_after(min(failures, MAX_FAILURES)) or 0.0
            code = hand.process.returncode
            log.warning(f"process {hand.process.pid} ended with {code}; starting another in {pause:.0f} s")
            self._again[hand.place] = time.monotonic() + pause

    def _stop(self) -> int:
        everyone = [*self._hands, *self._coming, *self._going]
        failed = any(hand.dead for hand in self._coming)
        asked = len(self._signals)
        for hand in everyone:
            hand.tell(signal.SIGTERM)
        until = time.monotonic() + self._config.shutdown_grace_seconds + _LATE_SECONDS
        while not all(hand.dead for hand in everyone):
            if time.monotonic() > until or (len(self._signals) > asked and self._stopping()):
                break
            time.sleep(_POLL_SECONDS / 5)
        return 1 if failed else 0


def _admin_port_is_free(config: GatewayConfig) -> None:
    """Our processes share it, and could not tell somebody else from each other.  Raises ConfigError."""
    host, port = config.admin_host, config.admin_port
    try:
        _bound(host, port, shared=False).close()
    except OSError as exc:
        raise ConfigError(f"cannot listen on {host}:{port} for the admin pages ({exc.strerror})") from exc


def listeners(host: str, port: int, processes: int) -> list[socket.socket]:
    """As many sockets on one port.  Raises OSError, also when somebody else has the port."""
    with _bound(host, port, shared=False) as probe:
        port = probe.getsockname()[1]  # 0 picks one
    return [listener(host, port) for _ in range(processes)]


def listener(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    made = _bound(host, port, shared=True)
    made.listen(2048)
    made.setblocking(False)
    return made


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def main(argv: Sequence[str] = sys.argv) -> int:
    given = json.loads(argv[1]) if argv[1:] else {}
    flags = {name: value for name, value in given.items() if value is not None}
    try:
        named = dict(flags)
        config = GatewayConfig.load(named.pop("config", None), **named)
        crew = Crew(flags, config)
    except ConfigError as exc:
        sys.exit(f"cairn gateway: {exc}")
    except OSError as exc:
        sys.exit(f"cairn gateway: cannot listen on {config.host}:{config.port}: {exc.strerror or exc}")
    with logs.opened(config):
        return crew.run()


if __name__ == "__main__":
    sys.exit(main())
