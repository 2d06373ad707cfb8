"""LMCache's two Redis connectors on bare values.  Run by values.py with LMCache's own python, not imported.

Reads commands from standard input, one a line ("set 0", "get 0": the round's number names the keys), moves
all values and answers with one JSON line of seconds.  `redis://` is its in-process connector on redis-py, as
its remote backend drives it (four jobs at a time); `resp` is its native client, as its daemon uses it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.connector.redis_connector import RedisConnector
from lmcache.v1.storage_backend.native_clients.resp_client import RESPClient

TOKENS = 256


class Key(str):
    def to_string(self) -> str:
        return str(self)


class Value:
    """What its connectors need of a MemoryObj: a tensor's bytes and what they are."""

    def __init__(self, shape: torch.Size) -> None:
        self.tensor = torch.ones(shape, dtype=torch.bfloat16)
        self.byte_array = memoryview(self.tensor.view(torch.uint8).numpy().reshape(-1))

    def get_shapes(self) -> list[torch.Size]:
        return [self.tensor.shape]

    def get_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_memory_format(self) -> MemoryFormat:
        return MemoryFormat.KV_2LTD


class Backend:
    """Stands for its CPU tier, whose memory is allocated before anything is asked for."""

    def __init__(self, shape: torch.Size, values: int) -> None:
        self.config = SimpleNamespace(extra_config=None, use_layerwise=False)
        self.metadata = SimpleNamespace(
            get_shapes=lambda: [shape],
            get_dtypes=lambda: [torch.bfloat16],
            get_num_groups=lambda: 1,
            use_mla=False,
            chunk_size=TOKENS,
        )
        self._free = [Value(shape) for _ in range(values)]
        self._next = 0

    def allocate(self, *about: object) -> Value:
        self._next += 1
        return self._free[self._next % len(self._free)]


class Redis:
    def __init__(self, args: argparse.Namespace, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        url = f"redis://:{os.environ['LMCACHE_RESP_PASSWORD']}@{args.host}:{args.port}/0"
        self._connector = RedisConnector(url, loop, backend)

    async def set(self, keys: list[Key], values: list[Value]) -> None:
        await self._connector.batched_put(keys, values)

    async def get(self, keys: list[Key], into: list[Value]) -> None:
        got = await asyncio.gather(*(self._connector.get(key) for key in keys))
        assert all(got), "a value is missing"


class Resp:
    def __init__(self, args: argparse.Namespace, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        password = os.environ["LMCACHE_RESP_PASSWORD"]
        self._client = RESPClient(args.host, args.port, args.threads, loop, "", password)

    async def set(self, keys: list[Key], values: list[Value]) -> None:
        await self._client.batch_set(list(keys), [value.byte_array for value in values])

    async def get(self, keys: list[Key], into: list[Value]) -> None:
        await self._client.batch_get(list(keys), [value.byte_array for value in into])


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def made(kind: type[Redis] | type[Resp], args: argparse.Namespace, backend: Backend) -> Redis | Resp:
    """Built on the loop that will run it."""
    return kind(args, asyncio.get_running_loop(), backend)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("redis", "resp"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--values", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True, help="bytes of a token's K in one layer, halved")
    args = parser.parse_args()
    shape = torch.Size((2, args.layers, TOKENS, args.heads))
    backend = Backend(shape, args.values)
    given = [Value(shape) for _ in range(args.values)]
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # its own words go to standard output as well
    with running_loop() as loop:

        def wait(work: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(60)

        client = wait(made({"redis": Redis, "resp": Resp}[args.kind], args, backend))
        print(json.dumps(given[0].byte_array.nbytes), file=out, flush=True)
        for line in sys.stdin:
            verb, number = line.split()
            keys = [Key(f"{args.kind}{args.threads}-{number}-{i}") for i in range(args.values)]
            began = time.perf_counter()
            wait(getattr(client, verb)(keys, given))
            print(json.dumps(time.perf_counter() - began), file=out, flush=True)
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    main()
