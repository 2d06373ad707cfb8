"""The way to the admin pages: their token, and a port of their own."""

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import uvicorn
from fastapi import HTTPException, Request
from pydantic import SecretStr
from starlette.types import ASGIApp

from cacheengine.config import ConfigError
from gateway.auth import credential
from gateway.config import GatewayConfig

_STOP_SECONDS = 1


def guard(token: SecretStr) -> Callable[[Request], Awaitable[None]]:
    """A dependency of every admin page: 401 without the token; nothing where it is empty."""
    wanted = token.get_secret_value().encode()

    async def check(request: Request) -> None:
        if wanted and not hmac.compare_digest(credential(request.headers.raw), wanted):
            raise HTTPException(401, "Incorrect admin token", {"www-authenticate": "Bearer"})

    return check


class _Server(uvicorn.Server):
    """Beside another server, which has the signals."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # as uvicorn declares it
        yield


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, config: GatewayConfig) -> AsyncIterator[uvicorn.Server]:
    """`app` on the admin port, in the running loop, for the body of the `with`.  The port is shared with
    this gateway's other processes.  Raises ConfigError when somebody else has it."""
    host, port = config.admin_host, config.admin_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} for the admin pages ({exc.strerror})") from exc
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_level=config.log_level,
            timeout_graceful_shutdown=_STOP_SECONDS,
            **config.tls(),
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="cairn-admin")
    try:
        yield server
    finally:
        server.should_exit = True
        await asyncio.wait((serving,))
        listener.close()
