"""What a request held is free when it is over, not when a collection comes round."""

import asyncio
import gc
import logging
import sys
from collections.abc import Iterator

import pytest
from starlette.types import ASGIApp, Message

from gateway.app import create_app
from gateway.config import GatewayConfig
from tests.fakes import FakeVLLM, serve

LONG = b"x" * 1_000_000


async def ask(app: ASGIApp, body: bytes) -> int:
    """The status of the answer."""
    said: list[Message] = []
    words = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(words, None) or await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await app(scope, receive, send)
    return int(said[0]["status"])


@pytest.fixture
def no_collections() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # pytest keeps every record, and with it the exception in it
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": ' + LONG, 400),
        (b'{"model": "nobody", "messages": "' + LONG + b'"}', 404),
        (b'{"model": "fake", "messages": [{"role": "user", "content": "' + LONG + b'"}]}', 200),
        (b'{"model": "fake", "stream": true, "messages": [{"content": "' + LONG + b'"}]}', 502),
    ],
    ids=["no JSON", "no such model", "the worker dies in its answer", "the worker dies before it"],
)
@pytest.mark.usefixtures("no_collections")
def test_the_body_of_a_request_that_failed_is_free_at_once(body, status):
    async def failed(url: str) -> int:
        app = create_app(GatewayConfig.load(None, workers=f"fake={url}", max_retries=0))
        async with app.router.lifespan_context(app):
            while await ask(app, b'{"model": "fake", "messages": []}') == 503:  # the worker is not known yet
                await asyncio.sleep(0.05)
            before = sys.getrefcount(body)
            assert await ask(app, body) == status
            await asyncio.sleep(0.05)  # cancelled timers and closed connections
            return sys.getrefcount(body) - before

    with serve(FakeVLLM(die_after=-1)) as url:
        assert asyncio.run(failed(url)) == 0
