"""Bodies nobody sends by accident, at every JSON endpoint of the real application: an OpenAI-shaped 4xx, or
the worker's own answer to exactly these bytes.  Never a 500, never a traceback, and nothing stays held."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings

from cacheengine.index_schema import WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import KeyScheme, Namespace, probe_keys
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.tokenize import ModelTokenizer
from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.hostile import Headers, bodies, headers
from tests.gateway.test_handshake import encoding

pytestmark = pytest.mark.e2e

CASES = 5000  # over all endpoints
SCHEME = KeyScheme(Namespace(b"n" * 16), 16)


class Obliging(FakeVLLM):
    """Says yes to whatever it is sent, without reading it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in ("/health", "/v1/models") or not self.asked_to(scope):
            return await super().__call__(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.asked.append((scope["path"], body))
        start = {"type": "http.response.start", "status": 200, "headers": [(b"x-obliged", b"1")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"{}"})
        return None

    @staticmethod
    def asked_to(scope: Any) -> bool:
        """Handshakes are answered as vLLM does; they carry no such header."""
        return any(key == b"x-hostile" for key, _ in scope["headers"])


@dataclass
class Reply:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


class Complaints(logging.Handler):
    """Everything said at error level, or with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.heard.append(self.format(record))


class House:
    """The application on a loop that runs only while it is asked."""

    def __init__(self, app: FastAPI, loop: asyncio.AbstractEventLoop, worker: Obliging) -> None:
        self.app, self._loop, self.worker = app, loop, worker
        self.complaints = Complaints()

    def send(self, path: str, headers: Headers, body: bytes, method: str = "POST") -> Reply:
        return self._loop.run_until_complete(self._send(path, headers, body, method))

    async def _send(self, path: str, headers: Headers, body: bytes, method: str) -> Reply:
        reply, asked = Reply(), False
        over = asyncio.Event()

        async def receive() -> Any:
            nonlocal asked
            if asked:
                await over.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status, reply.headers = message["status"], dict(message["headers"])
            else:
                reply.body += message["body"]
                if not message.get("more_body"):
                    over.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        await self.app(scope, receive, send)
        assert over.is_set(), "the answer has no end"
        return reply

    def metric(self, line: str) -> float:
        samples = self.send("/metrics", [], b"", "GET").body.decode().splitlines()
        return sum(float(sample.rsplit(" ", 1)[1]) for sample in samples if sample.startswith(line))


@pytest.fixture(scope="module")
def house(valkey_server: Any, smollm: ModelTokenizer, smollm_path: Path) -> Iterator[House]:
    """A gateway that knows its worker's tokenizer, so that hostile prompts are rendered and keyed too."""
    valkey_server.start()
    valkey_server.flush()
    worker = Obliging(encode=encoding(smollm, []))
    loop = asyncio.new_event_loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        url = stack.enter_context(serve(worker))
        info = WorkerInfo(
            "w", url, "fake", str(smollm_path), SCHEME.namespace.hex(), SCHEME.chunk_tokens,
            probe_keys=tuple(probe_keys(SCHEME)), payload_bytes=1, tiers=("host",),
        )  # fmt: skip
        writer = IndexWriter(valkey_server.url, info, 600, 60, dict, list)
        writer.start()
        stack.callback(writer.close)
        wait_until(lambda: writer.stats.announcements)
        config = GatewayConfig(redis_url=valkey_server.url, index_deadline_ms=1000, aliases=["nick=fake"])
        app = create_app(config)
        lifespan = app.router.lifespan_context(app)
        loop.run_until_complete(lifespan.__aenter__())
        stack.callback(lambda: loop.run_until_complete(lifespan.__aexit__(None, None, None)))
        made = House(app, loop, worker)
        logging.getLogger().addHandler(made.complaints)
        stack.callback(logging.getLogger().removeHandler, made.complaints)
        keyed = b'{"prompt": "' + b"a stone upon a stone " * 20 + b'"}'
        mark = [(b"x-hostile", b"1"), (b"x-cairn-explain", b"1")]

        def knows_the_tokenizer() -> bool:
            loop.run_until_complete(asyncio.sleep(0.02))
            return made.send("/v1/completions", mark, keyed).headers.get(b"x-cairn-reason") == b"cold"

        wait_until(knows_the_tokenizer)
        yield made


def endpoints(app: FastAPI) -> list[str]:
    """Every path that takes a POST with a JSON body and no name in it."""
    found = {
        str(route.path)
        for route in app.routes
        if "POST" in (getattr(route, "methods", None) or ()) and "{" not in getattr(route, "path", "{")
    }
    return sorted(found)


def well_said(path: str, answer: Any) -> bool:
    """A refusal in the shape that the path's own clients parse."""
    error = answer["error"]
    if path.startswith("/v1/messages"):
        return answer["type"] == "error" and {"type", "message"} <= set(error) and bool(error["message"])
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


def is_a_refusal(path: str, reply: Reply) -> bool:
    json_ = reply.headers.get(b"content-type") == b"application/json"
    return 400 <= reply.status < 500 and json_ and well_said(path, json.loads(reply.body))


def what_python_reads(body: bytes) -> Any:
    """As vLLM's server does: the last of several equal names counts."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def judge(house: House, path: str, head: Headers, body: bytes) -> str:
    """Send it; `refused`, `relayed` or `explained`.  Anything else is a failure of the test."""
    house.worker.asked.clear()
    house.complaints.heard.clear()
    reply = house.send(path, [*head, (b"x-hostile", b"1")], body)
    assert not house.complaints.heard, house.complaints.heard
    if reply.headers.get(b"x-obliged") == b"1":
        ((_, sent),) = house.worker.asked
        asked = what_python_reads(body)
        if asked is not None:
            meant = asked.get("model")
            assert meant in (None, "fake", "nick"), "the worker would read another model than the gateway did"
        if b"nick" not in body:
            assert sent == body
        return "relayed"
    assert not house.worker.asked, "the worker was asked, and the client does not get its answer"
    if path.startswith("/admin") and reply.status == 200:
        return "explained"
    assert is_a_refusal(path, reply), (reply.status, reply.headers, reply.body[:300])
    return "refused"


def test_hostile_bodies_are_refused_or_answered_and_nothing_stays_held(house: House) -> None:
    paths = [*endpoints(house.app), "/v1/not/there"]
    seen: dict[str, int] = {}

    @settings(
        max_examples=-(-CASES // len(paths)), deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(body=bodies, head=headers)
    def every_path(body: bytes, head: Headers) -> None:
        for path in paths:
            verdict = judge(house, path, head, body)
            seen[verdict] = seen.get(verdict, 0) + 1

    every_path()
    print(f"{sum(seen.values())} cases at {len(paths)} paths: {seen}")
    assert sum(seen.values()) >= CASES
    assert seen["relayed"] > CASES // 10, (
        "hardly anything reached a worker: the cases are too wild to be hostile"
    )
    assert house.metric("cairn_gateway_inflight_requests") == 0
