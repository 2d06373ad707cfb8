"""A fleet that computes nothing, to look at the dashboard.   python -m loadtests.demo [--minutes 15]

A Valkey, a gateway and four emulated workers in one process: each has a cache of three tiers and part of the
shared one, computes one prompt at a time at a fixed speed, and tells the index what it holds as a real worker
does.  Clients ask about documents, some far more often than others, behind a common system prompt; a few
hang up or ask what cannot be answered.  The address of the page is printed.  Nothing here is a measurement.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from cacheengine.index_schema import DEVICE, DISK, HOST, SHARED, Entry, WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of, probe_keys
from gateway.app import create_app
from gateway.ask import Ask
from gateway.config import GatewayConfig
from gateway.launch.config import DEFAULT_MODEL, LaunchConfig
from gateway.launch.model import prepare
from gateway.tokenize import ModelTokenizer
from loadtests.texts import DOCUMENTS, SYSTEM, popular
from tests.fakes import serve
from tests.servers import Server

MODEL, CHUNK = "demo-8b", 32
SCHEME = KeyScheme(namespace_of({"demo": MODEL}), CHUNK)
TOKEN_BYTES = 32_768
RATE = 6000.0  # tokens/s of prefill
SPEEDS = {"bw_host": 2.0e9, "bw_disk": 6.0e8, "bw_redis": 4.0e8}  # bytes/s
TTL_SECONDS, LEASE_SECONDS = 1800.0, 6.0


class TieredCache:
    """One least-recently-used list: its youngest chunks are on the device too, more on the host, all on disk.

    The front of a prompt is always younger than its end, so what a tier holds is prefix-closed."""

    def __init__(self, slots: Mapping[int, int], shared: set[ChunkKey]) -> None:
        self.slots, self._shared = slots, shared
        self._held: OrderedDict[ChunkKey, tuple[ChunkKey, int]] = OrderedDict()  # oldest first: root, tiers

    def used(self, tier: int) -> int:
        return min(len(self._held), self.slots[tier])

    def entries(self) -> list[Entry]:
        return [Entry(root, key, bits) for key, (root, bits) in self._held.items()]

    def found(self, keys: Sequence[ChunkKey]) -> dict[int, int]:
        """Leading chunks by the tier they would be loaded from."""
        by_tier = dict.fromkeys((DEVICE, HOST, DISK, SHARED), 0)
        for key in keys:
            bits = self._held[key][1] if key in self._held else SHARED if key in self._shared else 0
            if not bits:
                break
            by_tier[bits & -bits] += 1  # the fastest: the lowest bit
        return by_tier

    def touch(self, keys: Sequence[ChunkKey]) -> list[Entry]:
        """A prompt was computed or loaded; what changed for the index."""
        for key in reversed(keys):
            self._held[key] = (keys[0], self._held.get(key, (keys[0], 0))[1])
            self._held.move_to_end(key)
        self._shared.update(keys)
        changes = []
        while len(self._held) > self.slots[DISK]:
            key, (root, _) = self._held.popitem(last=False)
            changes.append(Entry(root, key, SHARED))
        for age, (key, (root, old)) in enumerate(reversed(self._held.items())):
            tiers = sum(tier for tier, slots in self.slots.items() if age < slots) | SHARED
            if tiers != old:
                self._held[key] = (root, tiers)
                changes.append(Entry(root, key, tiers))
        return changes


class Worker:
    """An ASGI application that looks like vLLM with our connector.  Enter it once its URL is known."""

    def __init__(
        self, name: str, folder: Path, tokenizer: ModelTokenizer, shared: set[ChunkKey], size: int
    ) -> None:
        self.name, self.healthy, self.rate = name, True, RATE
        self._folder, self._tokenizer = folder, tokenizer
        self.cache = TieredCache({DEVICE: size, HOST: 3 * size, DISK: 8 * size}, shared)
        self._lock, self._books = asyncio.Lock(), threading.Lock()
        self._running = self._waiting = self._queued = 0
        self._writer: IndexWriter | None = None

    @contextlib.contextmanager
    def joined(self, redis_url: str, url: str, model: str = MODEL) -> Iterator[None]:
        """In the fleet for the body of the `with`."""
        info = WorkerInfo(
            self.name, url, model, str(self._folder), SCHEME.namespace.hex(), CHUNK,
            tuple(probe_keys(SCHEME)), block_size=CHUNK, payload_bytes=CHUNK * TOKEN_BYTES,
            tiers=("device", "host", "disk", "redis"), boot_id=uuid4().hex,
        )  # fmt: skip
        self._writer = IndexWriter(redis_url, info, TTL_SECONDS, LEASE_SECONDS, self._beat, self._inventory)
        self._writer.start()
        try:
            yield
        finally:
            self._writer.close()

    def _inventory(self) -> list[Entry]:
        with self._books:
            return self.cache.entries()

    def _beat(self) -> Mapping[str, float | int | str]:
        fill: dict[str, float] = {}
        with self._books:
            for name, tier in (("device", DEVICE), ("host", HOST), ("disk", DISK)):
                fill |= {f"{name}_used": self.cache.used(tier), f"{name}_slots": self.cache.slots[tier]}
        load = {"running": self._running, "waiting": self._waiting, "queued_tokens": self._queued}
        return {**load, "prefill_rate": self.rate, **SPEEDS, **fill, "redis_up": 1}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                await send({"type": f"{(await receive())['type']}.complete"})
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        match scope["path"]:
            case "/health":
                await _reply(send, 200 if self.healthy else 503, {})
            case "/v1/models":
                await _reply(send, 200, {"data": [{"id": MODEL, "parent": None}]})
            case "/tokenize":
                ids = self._ids(json.loads(body))
                await _reply(send, 200, {"tokens": ids, "count": len(ids), "max_model_len": 1 << 17})
            case _:
                await self._generate(json.loads(body), send)

    def _ids(self, body: Mapping[str, Any]) -> Sequence[int]:
        asked = {name: body[name] for name in ("messages", "prompt") if name in body}
        return self._tokenizer.tokens(Ask(**asked), "messages" in asked).ids

    async def _generate(self, body: Mapping[str, Any], send: Any) -> None:
        words = body.get("max_tokens", 12)
        if words < 1:
            error = {
                "message": "max_tokens must be at least 1.",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            }
            return await _reply(send, 400, {"error": error})
        ids = self._ids(body)
        cached = await self._prefill(ids)
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": words,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        self._running += 1
        try:
            await send(_start(200, b"text/event-stream"))
            for number in range(words):
                text = {
                    "choices": [
                        {"index": 0, "text": f" word{number}", "delta": {"content": f" word{number}"}}
                    ]
                }
                await send(_event(text))
                await asyncio.sleep(0.015)
            await send(_event({"choices": [], "usage": usage}))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            self._running -= 1

    async def _prefill(self, ids: Sequence[int]) -> int:
        """One prompt at a time; tokens that did not have to be computed."""
        keys = SCHEME.keys(ids)
        self._waiting, self._queued = self._waiting + 1, self._queued + len(ids)
        try:
            async with self._lock:
                self._waiting, self._running = self._waiting - 1, self._running + 1
                try:
                    with self._books:
                        found = self.cache.found(keys)
                    moved = zip((HOST, DISK, SHARED), SPEEDS.values(), strict=True)
                    loading = sum(found[tier] * CHUNK * TOKEN_BYTES / speed for tier, speed in moved)
                    cached = min(sum(found.values()) * CHUNK, len(ids) - 1)
                    await asyncio.sleep(loading + (len(ids) - cached) / self.rate)
                    with self._books:
                        changes = self.cache.touch(keys)
                    if self._writer is not None:
                        self._writer.publish(changes)
                finally:
                    self._waiting, self._running = self._waiting + 1, self._running - 1
        finally:
            self._waiting, self._queued = self._waiting - 1, self._queued - len(ids)
        return cached


def _start(status: int, kind: bytes) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def _event(data: object) -> dict[str, Any]:
    body = b"data: " + json.dumps(data).encode() + b"\n\n"
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _reply(send: Any, status: int, document: object) -> None:
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": json.dumps(document).encode()})


@contextlib.contextmanager
def fleet(
    redis_url: str, model: Path, workers: int = 4, size: int = 96, **knobs: Any
) -> Iterator[tuple[str, list[Worker]]]:
    """A gateway and its workers; the gateway's URL.  `size`: chunks a device holds."""
    tokenizer, shared = ModelTokenizer.load(model), set[ChunkKey]()
    with contextlib.ExitStack() as opened:
        made = [Worker(f"w{n}", model, tokenizer, shared, size) for n in range(1, workers + 1)]
        for worker in made:
            opened.enter_context(worker.joined(redis_url, opened.enter_context(serve(worker))))
        config = GatewayConfig(redis_url=redis_url, index_deadline_ms=50, warmup_seconds=10, **knobs)
        yield opened.enter_context(serve(create_app(config))), made


async def load(url: str, going: Callable[[], bool], rate: float = 9.0, seed: int = 1) -> int:
    """Requests at random times, `rate` a second on average, while `going()`; how many were sent."""
    rng, sent = random.Random(seed), 0
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        while going():
            group.create_task(_ask(client, _body(rng, sent), abort=rng.random() < 0.02))
            sent += 1
            await asyncio.sleep(rng.expovariate(rate))
    return sent


def _body(rng: random.Random, number: int) -> dict[str, Any]:
    document = (
        popular(rng, DOCUMENTS, 0.4) if rng.random() < 0.85 else rng.choice(DOCUMENTS)[: 400 + number % 900]
    )
    fresh = rng.random() < 0.12
    words = 0 if rng.random() < 0.01 else rng.randrange(4, 40)
    return {
        "model": "no-such-model" if rng.random() < 0.004 else MODEL,
        "prompt": f"{f'{number} alone. ' if fresh else SYSTEM}\n\n{document}\n\nQuestion {number}?",
        "stream": True, "stream_options": {"include_usage": True}, "max_tokens": words,
    }  # fmt: skip


async def _ask(client: httpx.AsyncClient, body: Mapping[str, Any], abort: bool) -> None:
    with contextlib.suppress(httpx.HTTPError):
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            async for _ in reply.aiter_raw():
                if abort:
                    return


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15)
    args = parser.parse_args(argv)
    model = prepare(DEFAULT_MODEL, LaunchConfig.load().root).path
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        valkey = Server(Path(folder))
        try:
            valkey.start()
            with fleet(valkey.url, model) as (url, _):
                print(f"{url}/dashboard", flush=True)
                until = time.monotonic() + 60 * args.minutes
                print(f"{asyncio.run(load(url, lambda: time.monotonic() < until))} requests")
        except KeyboardInterrupt:
            pass
        finally:
            valkey.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
