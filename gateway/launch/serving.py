"""One process of the gateway, started by gateway/launch/serve.py: an application under uvicorn.

Its argument is a JSON object: `flags` of GatewayConfig, `listeners` (inherited sockets), `life` (a pipe that
ends when the parent does), `ready` (a pipe to say so on), and with several processes `board` and `number`.

SIGTERM  no new connections; open answers may finish for shutdown_grace_seconds
SIGUSR1  somebody else has taken over: the same, and answers may take their time
"""

import asyncio
import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from cacheengine.config import ConfigError
from gateway import logs
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.connection import connections
from gateway.siblings import NO_SIBLINGS, Siblings
from gateway.tracing import tracer
from router.load import LoadBoard
from router.shared_load import SharedLoadBoard

CONNECTIONS = 2  # for each of max_inflight: keep-alive connections wait for their next request
PEACE_SECONDS = 3600.0  # for answers of a process that was replaced
LINGER_SECONDS = 1.0  # in which kept connections are told to close, before they are closed
_CLOSE = ("connection", "close")


class Server(uvicorn.Server):
    """Says when it is ready, and leaves in two steps: first it takes no new connections and tells those it
    has to close after their next answer, so that no request is on its way to a connection being closed."""

    app: FastAPI
    ready = -1  # a file descriptor

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """main() does."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready >= 0:
            os.write(self.ready, b".")
            os.close(self.ready)

    def leave(self, grace_seconds: float) -> None:
        """Idempotent; the last grace counts."""
        self.config.timeout_graceful_shutdown = int(grace_seconds)
        if _CLOSE not in self.config.headers:
            self.config.headers.append(_CLOSE)
            self.config.encoded_headers.append((b"connection", b"close"))
            self.server_state.default_headers = [
                *self.server_state.default_headers,
                (b"connection", b"close"),
            ]
            for server in getattr(self, "servers", ()):
                server.close()
            if beside := getattr(self.app.state, "beside", None):  # the admin pages' own server
                beside.should_exit = True
            asyncio.get_running_loop().create_task(self._linger())

    async def _linger(self) -> None:
        until = asyncio.get_running_loop().time() + LINGER_SECONDS
        while self.server_state.connections and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True


def server(config: GatewayConfig, board: LoadBoard, siblings: Siblings) -> Server:
    """A second listener (say, of another application) is a second Server in run().  Raises ConfigError."""
    traced = tracer(os.environ)
    try:
        app = create_app(config, tracer=traced, board=board, siblings=siblings)
        settings = uvicorn.Config(
            app,
            interface="asgi3",
            loop="uvloop",
            http=connections(
                config.receive_timeout_seconds, CONNECTIONS * config.max_inflight, config.idle_timeout_seconds
            ),
            ws="none",
            access_log=False,
            proxy_headers=False,  # nobody asks who the caller is by address
            log_level=config.log_level,
            log_config=None,  # its lines are ours too
            **config.tls(),
        )
        settings.load()
    except OSError as exc:
        raise ConfigError(f"a file that TLS needs cannot be used: {exc}") from exc
    made = Server(settings)
    made.app = app
    return made


async def run(serving: Server, sockets: list[socket.socket], life: int, grace_seconds: float) -> None:
    """Until told to leave, or the parent is gone."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, serving.leave, grace_seconds)
    loop.add_signal_handler(signal.SIGUSR1, serving.leave, PEACE_SECONDS)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # a terminal sends it to the parent too
    loop.add_signal_handler(signal.SIGHUP, lambda: None)

    def orphaned() -> None:
        loop.remove_reader(life)
        serving.leave(grace_seconds)

    loop.add_reader(life, orphaned)
    await serving.serve(sockets)


def _many_files() -> None:
    """As many as we may have: each request has a socket on either side, and a process that runs out of them
    takes every worker for one that cannot be reached."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    told = json.loads(sys.argv[1])
    _many_files()
    flags = dict(told["flags"])
    try:
        config = GatewayConfig.load(flags.pop("config", None), **flags)
        board, siblings = LoadBoard(), NO_SIBLINGS
        if told["board"]:
            path = Path(told["board"])
            board = SharedLoadBoard(path, told["number"])
            siblings = Siblings(path.parent, told["number"])
        serving = server(config, board, siblings)
    except ConfigError as exc:
        sys.exit(f"cairn gateway: {exc}")
    serving.ready = told["ready"]
    sockets = [socket.socket(fileno=fd) for fd in told["listeners"]]
    gc.set_threshold(5_000, 10, 5)  # a twentieth of the time went into looking at requests under way
    gc.collect()
    gc.freeze()  # what is here stays: later collections need not look at it
    with logs.opened(config):
        runner = asyncio.Runner(loop_factory=serving.config.get_loop_factory())
        with runner:
            runner.run(run(serving, sockets, told["life"], config.shutdown_grace_seconds))


if __name__ == "__main__":
    main()
