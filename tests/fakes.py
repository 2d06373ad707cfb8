"""Fakes at the seam, real sockets: a worker that speaks just enough of vLLM's HTTP, and ways to die."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn


@contextlib.contextmanager
def serve(app: Any, **more: Any) -> Iterator[str]:
    """A real uvicorn in a thread on a free loopback port; yields its base URL.  `more` of its settings."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            interface="asgi3",
            http="httptools",
            loop="uvloop",
            ws="none",
            log_level="critical",
            timeout_graceful_shutdown=1,
            **more,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="serve")
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            assert server.started, "the application did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll until `true()`; the limit only ends a test that has already failed."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.005)


def refusing_url() -> str:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def slamming(reset: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads each request and closes without a word, except that /health is fine.  `reset`: with
    a TCP reset instead of an end.

    Yields its URL and the request heads it heard."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    head = peer.recv(65536)
                    heard.append(head)
                    if reset and not head.startswith(b"GET"):
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    if head.startswith(b"GET /health"):
                        peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        thread = threading.Thread(target=run, name="slamming")
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@dataclass
class FakeVLLM:
    """Speaks just enough OpenAI and /tokenize; remembers what it was asked and whether it was hung up on."""

    model: str = "fake"
    tokens: int = 3  # words in an answer
    gap: float = 0.0  # seconds before each word
    pause: float = 0.0  # seconds before anything is said, even an error
    gaps: list[float] = field(default_factory=list)  # the same, word by word; wins over `gap`
    status: int = 200  # of generations; anything else is answered with vLLM's error shape
    die_after: int | None = None  # words, then the connection is cut
    torn: bool = False  # when dying, cut inside an event
    cached_tokens: int = 0
    adapters: list[str] = field(default_factory=list)
    healthy: bool = True
    encode: Callable[[dict[str, Any]], list[int]] = field(default=lambda _: [])  # answers /tokenize
    aborted: int = 0
    running: int = 0
    asked: list[tuple[str, bytes]] = field(default_factory=list)  # path, body
    headers: list[dict[bytes, bytes]] = field(default_factory=list)  # of each generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await _lifespan(receive, send)
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":  # sooner than we could read, on a slow machine
                self.aborted += 1
                self.asked.append((scope["path"], body))
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/health":
            return await _reply(send, 200 if self.healthy else 503, b"")
        if path == "/v1/models":
            cards = [{"id": self.model, "object": "model", "parent": None}]
            cards += [{"id": name, "object": "model", "parent": self.model} for name in self.adapters]
            return await _json(send, {"object": "list", "data": cards})
        if path == "/tokenize":
            ids = self.encode(json.loads(body))
            return await _json(send, {"tokens": ids, "count": len(ids), "max_model_len": 8192})
        self.asked.append((path, body))
        self.headers.append(dict(scope["headers"]))
        await self._until_hangup(receive, self._generate(json.loads(body), send))
        return None

    async def _until_hangup(self, receive: Any, work: Any) -> None:
        self.running += 1
        task = asyncio.create_task(work)
        ears = asyncio.create_task(receive())
        await asyncio.wait((task, ears), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.aborted += 1
            task.cancel()
        ears.cancel()
        await asyncio.gather(task, ears, return_exceptions=True)
        self.running -= 1

    async def _generate(self, ask: dict[str, Any], send: Any) -> None:
        await asyncio.sleep(self.pause)
        if self.status != 200:
            error = {
                "message": "the worker says no",
                "type": "BadRequestError",
                "param": None,
                "code": self.status,
            }
            return await _json(send, {"error": error}, self.status)
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if not ask.get("stream"):
            words = await self._speak(lambda word: asyncio.sleep(0))
            if words is None:
                await send(_start(200, b"application/json", length=1000))
                return await send({"type": "http.response.body", "body": b'{"id":', "more_body": True})
            message = {"role": "assistant", "content": " ".join(words)}
            answer = {"id": "x", "choices": [{"index": 0, "message": message}], "usage": usage}
            return await _json(send, answer)
        await send(_start(200, b"text/event-stream; charset=utf-8"))

        async def event(word: str) -> None:
            data = {"id": "x", "choices": [{"index": 0, "delta": {"content": word}}]}
            await send(_part(b"data: " + json.dumps(data).encode() + b"\n\n"))

        if await self._speak(event) is None:
            if self.torn:
                await send(_part(b'data: {"id": "x", "cho'))
            return None
        await send(
            _part(b"data: " + json.dumps({"id": "x", "choices": [], "usage": usage}).encode() + b"\n\n")
        )
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return None

    async def _speak(self, say: Callable[[str], Any]) -> list[str] | None:
        """The answer's words, each said in its time; None when the worker dies before the last."""
        words = []
        for i in range(self.tokens):
            if self.die_after is not None and i >= self.die_after:
                return None
            await asyncio.sleep(self.gaps[i] if i < len(self.gaps) else self.gap)
            words.append(f"word{i}")
            await say(words[-1])
        return words


def _start(status: int, kind: bytes, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", kind), (b"x-request-id", b"from-the-worker")]
    if length is not None:
        headers.append((b"content-length", b"%d" % length))
    return {"type": "http.response.start", "status": status, "headers": headers}


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _reply(send: Any, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    await send(_start(status, kind, len(body)))
    await send({"type": "http.response.body", "body": body})


async def _json(send: Any, document: Any, status: int = 200) -> None:
    await _reply(send, status, json.dumps(document).encode())


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
