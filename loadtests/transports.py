"""The gateway over other HTTP clients.   python -m loadtests.transports aiohttp '{"port": 8000}'

What docs/adr/0026 measured: httpx's own pool, httpx over aiohttp's sockets (where httpx-aiohttp is
installed), and aiohttp itself, behind the same seam.  Only for a bench: errors are not all told apart.
"""

import importlib
import json
import sys
from collections.abc import AsyncIterator

import aiohttp
import httpx
import uvicorn

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.wire import Broken, Headers, NotConnected, Question, Reply, Transport


class HttpxReply:
    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers: Headers = [(name.lower(), value) for name, value in response.headers.raw]
        self._response = response
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._rest: AsyncIterator[bytes] = aiter(response.stream)
        self.over = False

    async def read(self) -> bytes:
        if self.over:
            return b""
        try:
            part = await anext(self._rest, b"")
            if not part:
                self.over = True
                await self._response.aclose()
        except httpx.TransportError as exc:
            raise Broken(exc) from exc
        return part

    def close(self) -> None:
        """The stream closes itself at its end."""


class Httpx:
    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def ask(self, question: Question) -> Reply:
        request = httpx.Request(
            "POST",
            question.base_url + question.target.decode(),
            headers=question.headers,
            content=question.body,
            extensions={"timeout": {"connect": question.connect_seconds}},
        )
        try:
            return HttpxReply(await self._transport.handle_async_request(request))
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise NotConnected(exc) from exc

    async def aclose(self) -> None:
        await self._transport.aclose()


class AiohttpReply:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers: Headers = [(name.lower(), value) for name, value in response.raw_headers]
        self._response = response

    @property
    def over(self) -> bool:
        return self._response.content.at_eof()

    async def read(self) -> bytes:
        return await self._response.content.readany()

    def close(self) -> None:
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Aiohttp:
    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, question: Question) -> Reply:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in question.headers]
        try:
            response = await self._session.post(
                question.base_url + question.target.decode(),
                data=question.body,
                headers=headers,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as exc:
            raise NotConnected(exc) from exc
        return AiohttpReply(response)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


def transport(name: str) -> Transport:
    """Raises ImportError where the other client is not installed."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4)
    if name == "aiohttp":
        return Aiohttp()
    if name == "httpx":
        return Httpx(httpx.AsyncHTTPTransport(limits=limits, trust_env=False))
    return Httpx(importlib.import_module("httpx_aiohttp").AiohttpTransport(limits=limits))


def main() -> None:
    config = GatewayConfig.load(None, **json.loads(sys.argv[2]))
    app = create_app(config, transport=transport(sys.argv[1]))
    settings = {"loop": "uvloop", "http": "httptools", "access_log": False, "log_level": "error"}
    uvicorn.run(app, port=config.port, interface="asgi3", **settings)


if __name__ == "__main__":
    main()
