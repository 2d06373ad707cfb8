"""The way to the admin pages: their token, a port of their own, and what a browser is not let do there.

A web page of somebody else can make its visitor's browser send orders to a gateway on loopback, and, once its
own name resolves to 127.0.0.1, read the answers.  So orders come from no other origin, and without a token
these pages are asked for by address or as localhost only.
"""

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from ipaddress import ip_address
from urllib.parse import urlsplit

import uvicorn
from fastapi import HTTPException, Request
from pydantic import SecretStr
from starlette.types import ASGIApp

from cacheengine.config import ConfigError
from gateway.auth import credential
from gateway.config import GatewayConfig
from gateway.connection import connections

_STOP_SECONDS = 1
_CONNECTIONS = 256  # of the port of their own


def guard(token: SecretStr) -> Callable[[Request], Awaitable[None]]:
    """A dependency of every admin page: 401 without the token, 403 for what somebody else's web page asks."""
    wanted = token.get_secret_value().encode()

    async def check(request: Request) -> None:
        if wanted and not hmac.compare_digest(credential(request.headers.raw), wanted):
            raise HTTPException(401, "Incorrect admin token", {"www-authenticate": "Bearer"})
        if not wanted and not _by_address(request.headers.get("host", "")):
            raise HTTPException(
                403, "Without an admin_token these pages are at an IP address or localhost only"
            )
        if request.method not in ("GET", "HEAD") and _from_elsewhere(request):
            raise HTTPException(403, "Orders are not taken from pages of other origins")

    return check


def _by_address(host: str) -> bool:
    """Whether no name server can have had a say in where a request to `host` went."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("", "localhost") or name.endswith(".localhost") or bool(ip_address(name))
    except ValueError:
        return False


def _from_elsewhere(request: Request) -> bool:
    """Whether a browser says that it is a page of another origin that asks.  Nobody else says anything."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")  # all that is told to plain http beyond loopback
    return origin is not None and origin.partition("://")[2] != request.headers.get("host")


class _Server(uvicorn.Server):
    """Beside another server, which has the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
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
            http=connections(config.receive_timeout_seconds, _CONNECTIONS, config.idle_timeout_seconds),
            ws="none",
            access_log=False,
            log_level=config.log_level,
            log_config=None,  # its lines go where the other server's go
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
