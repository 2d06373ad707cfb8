"""A load from a slow Redis beside a stream of tokens: what the stream notices.   [--quick]

The question: one request loads a prefix of 3,000 tokens through a wire of 10 MB/s, for seconds; another one
is in the middle of its answer.  Does it wait?  The ceiling: the same stream just before and after the load.

One worker stores the prompts, another one with an empty host tier loads them, each once, through a throttling
proxy; the worker's own counters prove that every load came from Redis.  Every repetition compares one stream
with itself: the gaps between its tokens while the other request loads, against those before and after.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

from rich import box
from rich.console import Console
from rich.table import Table

from gateway.launch.config import DEFAULT_MODEL
from loadtests.engine import CHUNK, GIB, NO_DEVICE_CACHE, BenchFailed, Engine, Lab, sentence_on_failure
from loadtests.report import Bar, finish
from loadtests.texts import slices
from loadtests.throttle import Throttle

TOKENS = 3000 // CHUNK * CHUNK + 1  # whole chunks and one token: next to nothing is left to compute
BAR = 1.10  # p99 during ÷ p99 before and after
_STREAM_PROMPT = 24  # tokens
_BESIDE_SECONDS = 6.0  # of stream before the load, and after it
_CALIBRATE_TOKENS = 96


@dataclass(frozen=True)
class Repetition:
    """Gaps between the stream's tokens in seconds, and how long the load took."""

    beside: list[float]  # before and after the load
    during: list[float]
    load_seconds: float

    def growth(self, percent: int) -> float:
        return percentile(self.during, percent) / percentile(self.beside, percent)


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank.  REQUIRES values."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def split(arrivals: Sequence[float], start: float, end: float) -> tuple[list[float], list[float]]:
    """Gaps (those outside start … end, those that overlap it).  Raises BenchFailed where one is missing."""
    beside: list[float] = []
    during: list[float] = []
    for before, after in pairwise(arrivals):
        (during if after > start and before < end else beside).append(after - before)
    if not during or not beside or arrivals[-1] < end:
        raise BenchFailed(f"a stream of {len(arrivals)} tokens did not outlast the load; try again")
    return beside, during


class Bench:
    def __init__(self, lab: Lab, prompts: list[list[int]], megabytes: float) -> None:
        self.lab, self.prompts, self._rate = lab, prompts, megabytes * 1e6

    def run(self) -> list[Repetition]:
        cache: dict[str, str | int] = {"chunk_tokens": CHUNK, "host_bytes": 1 * GIB}
        with ExitStack() as stack:
            redis_url = stack.enter_context(self.lab.valkey())
            writer = {**cache, "worker_id": "writer"}
            with self.lab.engine("writer", writer, *NO_DEVICE_CACHE, redis_url=redis_url) as engine:
                for prompt in self.prompts:
                    engine.proved(prompt, "")
                engine.settled(sum(len(prompt) // CHUNK for prompt in self.prompts), "redis")
            server = urlsplit(redis_url)
            wire = stack.enter_context(Throttle(("127.0.0.1", server.port or 6379)))
            slow = server._replace(netloc=f":{server.password}@127.0.0.1:{wire.port}").geturl()
            reader = {**cache, "worker_id": "reader", "redis_timeout_ms": 30_000}
            engine = stack.enter_context(self.lab.engine("reader", reader, *NO_DEVICE_CACHE, redis_url=slow))
            first, *asked = self.prompts
            engine.proved(first, "redis")  # over a fast wire: wakes the worker
            rate = self._decode_rate(engine)
            return [self._repeat(engine, wire, prompt, rate) for prompt in asked]

    def _decode_rate(self, engine: Engine) -> float:
        """Tokens/s of a stream that has the worker to itself."""
        answer = engine.ask(self.prompts[0][:_STREAM_PROMPT], _CALIBRATE_TOKENS)
        return 1 / statistics.median(answer.gaps)

    def _repeat(self, engine: Engine, wire: Throttle, prompt: list[int], rate: float) -> Repetition:
        expected = TOKENS * self._token_bytes() / self._rate
        count = int(rate * (2 * _BESIDE_SECONDS + 1.3 * expected))
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(engine.ask, prompt[-_STREAM_PROMPT:], count)
            time.sleep(_BESIDE_SECONDS)
            wire.rate = self._rate
            start = time.perf_counter()
            seconds = engine.proved(prompt, "redis")
            wire.rate = float("inf")
            arrivals = stream.result().arrivals
        return Repetition(*split(arrivals, start, start + seconds), seconds)

    def _token_bytes(self) -> int:
        """KV bytes of one token: SmolLM2-135M in bfloat16 has 23,040; only sizes the stream."""
        return 23_040


def table(found: Sequence[Repetition], megabytes: float) -> Table:
    title = f"gaps between a stream's tokens while {TOKENS:,} tokens load at {megabytes:g} MB/s, ms"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("load s", "tokens", "p50 beside", "p50 during", "p99 beside", "p99 during", "p99 ÷"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in found:
        gaps = [percentile(values, p) * 1e3 for p in (50, 99) for values in (one.beside, one.during)]
        shown.add_row(
            f"{one.load_seconds:.1f}", str(len(one.during)), *(f"{gap:.1f}" for gap in gaps),
            f"{one.growth(99):.3f}",
        )  # fmt: skip
    return shown


def results(found: Sequence[Repetition]) -> dict[str, float]:
    growths = [one.growth(99) for one in found]
    return {
        "repetitions": len(found),
        "load s": statistics.median(one.load_seconds for one in found),
        "p50 growth": statistics.median(one.growth(50) for one in found),
        "p99 growth": statistics.median(growths),
        "p99 growth min": min(growths),
        "p99 growth max": max(growths),
        "longest gap during, s": max(max(one.during) for one in found),
    }


def bench(args: argparse.Namespace) -> int:
    count = args.repetitions or (2 if args.quick else 4)
    with Lab(Console(stderr=True), model=args.model) as lab:
        prompts = slices(lab.token_ids(), count + 1, TOKENS)
        found = Bench(lab, prompts, args.megabytes).run()
    Console().print(table(found, args.megabytes))
    numbers = results(found)
    bars = {
        "p99 during / beside": Bar(numbers["p99 growth"], BAR, "lower"),
        "longest gap / load": Bar(max(max(one.during) / one.load_seconds for one in found), 0.5, "lower"),
    }
    return finish("never_blocks", numbers, bars)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two repetitions: a first look")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for `cairn up`")
    parser.add_argument("--megabytes", type=float, default=10.0, help="a second that the wire passes")
    parser.add_argument("--repetitions", type=int, default=0, help="default 4, quick 2")
    args = parser.parse_args(argv)
    return sentence_on_failure(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
