"""A load from a slow Redis never stops the others; how much they notice is loadtests.bench_never_blocks."""

import json
import threading
import time

import pytest

from loadtests.throttle import Throttle
from tests.engine.prompts import prompts
from tests.engine.rig import Worker

CHUNK = 256
PREFIX = 11 * CHUNK + 1  # one token is left to compute
BYTES_PER_SECOND = 10e6
NO_DEVICE_CACHE = ("--no-enable-prefix-caching",)


class Stream:
    """An answer of many tokens and when each of them came; hangs up at the end of the `with`."""

    def __init__(self, worker: Worker, prompt: list[int]) -> None:
        self.arrivals: list[float] = []
        self.trouble: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(worker, prompt))

    def _read(self, worker: Worker, prompt: list[int]) -> None:
        body = {"model": "smol", "prompt": prompt, "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with worker.http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if self._stop.is_set():
                    return
                if line.startswith("data: {"):
                    if "error" in json.loads(line[6:]):
                        self.trouble.append(line)
                    self.arrivals.append(time.monotonic())

    def __enter__(self) -> "Stream":
        self._thread.start()
        while len(self.arrivals) < 10:
            assert self._thread.is_alive(), "the stream ended before it began"
            time.sleep(0.05)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def stored(start, valkey_module) -> list[int]:
    """A prompt that only Redis holds."""
    first = start("stores", {"worker_id": "stores"}, args=NO_DEVICE_CACHE, redis_url=valkey_module.unix_url)
    prompt = max(prompts(first.ready()), key=len)[:PREFIX]
    assert len(prompt) == PREFIX
    first.complete(prompt, 1)
    first.settled("redis", PREFIX // CHUNK)
    first.kill()
    return prompt


def test_while_one_request_loads_for_seconds_another_keeps_receiving_tokens(start, stored, valkey_module):
    with Throttle(("127.0.0.1", valkey_module.port)) as wire:
        cache = {"worker_id": "loads", "redis_timeout_ms": 30_000}
        worker = start("loads", cache, args=NO_DEVICE_CACHE, redis_url=wire.url).ready()
        worker.complete([5, 6, 7], 2)  # the first request of a process pays for what all later ones use
        wire.rate = BYTES_PER_SECOND
        with Stream(worker, stored[:20]) as stream:
            begin = time.monotonic()
            worker.complete(stored, 1)
            end = time.monotonic()
        wire.rate = float("inf")
        assert worker.hits("redis") == PREFIX - 1
        during = [at for at in stream.arrivals if begin < at < end]
        gaps = [b - a for a, b in zip([begin, *during], [*during, end], strict=True)]
        assert stream.trouble == []
        assert len(during) >= 20, f"{len(during)} tokens in {end - begin:.1f} s"
        assert max(gaps) < (end - begin) / 2, f"nothing for {max(gaps):.1f} of {end - begin:.1f} s"
