"""Time to first token, cold against warm from every tier.   python -m loadtests.bench_ttft [--quick]

The question: how long does a user wait for an answer to 3,000 tokens that some tier already holds?
The ceilings: cold, plain vLLM without our connector, which a cold Cairn must not exceed; warm, vLLM's own hit
in device memory, below which no tier can get, since the rest of the prompt must be computed.

One worker at a time on one machine: plain, plain with prefix caching, then Cairn cold and from host memory;
kill -9, the same worker again, from disk; then another worker with an empty disk, from Redis.  Every time is
proved by the worker's own counters: a prompt that came from elsewhere fails the bench (exit code 2).
cold ÷ warm divides the lower of the two cold medians.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

from gateway.launch.config import DEFAULT_MODEL
from loadtests.engine import CHUNK, MAX_MODEL_LEN, NO_DEVICE_CACHE, Engine, Lab, sentence_on_failure
from loadtests.report import Bar, finish
from loadtests.texts import slices

BARS = {"host": 12.0, "disk": 10.0, "redis": 8.0}  # cold ÷ warm
HOST_TO_DEVICE = 1.3
PLAIN, DEVICE, COLD = "cold, plain vLLM", "device (vLLM's own)", "cold, Cairn"
_NAMES = {"host": "host", "disk": "disk, after kill -9", "redis": "redis, another worker"}
_QUICK_WARM_UP = 600  # tokens


@dataclass
class Times:
    """Seconds of each prompt in each case, in the order of the table."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def median(self, case: str) -> float:
        return statistics.median(self.of[case])

    @property
    def cold(self) -> float:
        return min(self.median(PLAIN), self.median(COLD))

    def table(self, tokens: int) -> Table:
        title = f"TTFT of {len(self.of[COLD])} prompts of {tokens:,} tokens"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in ("median s", "min–max s", "cold ÷ it", "÷ device"):
            table.add_column(name, justify="right", no_wrap=True)
        for case, seconds in self.of.items():
            table.add_row(
                case,
                f"{self.median(case):.3f}",
                f"{min(seconds):.3f}–{max(seconds):.3f}",
                f"{self.cold / self.median(case):.1f}×",
                f"{self.median(case) / self.median(DEVICE):.2f}×",
            )
        return table

    def results(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for case, seconds in self.of.items():
            found |= {
                f"{case} s": self.median(case),
                f"{case} min s": min(seconds),
                f"{case} max s": max(seconds),
            }
        return found

    def bars(self) -> dict[str, Bar]:
        warm = {tier: self.median(case) for tier, case in _NAMES.items()}
        bars = {f"cold / {tier}": Bar(self.cold / warm[tier], bar) for tier, bar in BARS.items()}
        return bars | {"host / device": Bar(warm["host"] / self.median(DEVICE), HOST_TO_DEVICE, "lower")}


@dataclass
class Bench:
    """`asked` are the measured prompts, `warm_up` another one that wakes a fresh worker."""

    lab: Lab
    asked: list[list[int]]
    warm_up: list[int]
    times: Times = field(default_factory=Times)

    def run(self, quick: bool) -> Times:
        if not quick:
            with self.lab.engine("plain", None, *NO_DEVICE_CACHE) as engine:
                self._wake(engine)
                self._measure(engine, PLAIN, "")
        with self.lab.engine("plain-prefix", None, "--enable-prefix-caching") as engine:
            self._device(engine)
        with self.lab.valkey() as redis_url:
            mine = self.lab.disk("first")
            with self.lab.engine("cairn-first", mine, *NO_DEVICE_CACHE, redis_url=redis_url) as engine:
                self._cold_and_host(engine)
                engine.kill()
            with self.lab.engine("cairn-again", mine, *NO_DEVICE_CACHE, redis_url=redis_url) as engine:
                self._wake(engine, "disk")
                self._measure(engine, _NAMES["disk"], "disk")
            other = self.lab.disk("other")
            with self.lab.engine("cairn-other", other, *NO_DEVICE_CACHE, redis_url=redis_url) as engine:
                self._wake(engine, "redis")
                self._measure(engine, _NAMES["redis"], "redis")
        return self.times

    def _device(self, engine: Engine) -> None:
        """Cold, then at once warm: device memory need not hold all prompts together."""
        self._wake(engine, "", "device")
        cold, warm = [], []
        for prompt in self.asked:
            cold.append(engine.proved(prompt, ""))
            warm.append(engine.proved(prompt, "device"))
        self.times.of.setdefault(PLAIN, cold)  # --quick has no other
        self.times.of[DEVICE] = warm

    def _cold_and_host(self, engine: Engine) -> None:
        """All cold, then all warm, so that no warm time competes with the writing behind a cold one."""
        engine.proved(self.warm_up, "")
        self._measure(engine, COLD, "")
        engine.settled(sum(len(prompt) // CHUNK for prompt in (self.warm_up, *self.asked)), "disk", "redis")
        self._wake(engine, "host")
        self._measure(engine, _NAMES["host"], "host")

    def _wake(self, engine: Engine, *claims: str) -> None:
        """The first requests of a process pay for what all later ones use."""
        for claim in claims or ("",):
            engine.proved(self.warm_up, claim)

    def _measure(self, engine: Engine, case: str, claim: str) -> None:
        self.times.of[case] = [engine.proved(prompt, claim) for prompt in self.asked]


def bench(args: argparse.Namespace) -> int:
    count = args.prompts or (2 if args.quick else 5)
    if not CHUNK < args.tokens <= MAX_MODEL_LEN - 64:
        raise ValueError(f"--tokens must be between {CHUNK + 1} and {MAX_MODEL_LEN - 64}")
    progress = Console(stderr=True, quiet=args.json_only)
    with Lab(progress, model=args.model, dtype=args.dtype) as lab:
        first, *asked = slices(lab.token_ids(), count + 1, args.tokens)
        warm_up = first[:_QUICK_WARM_UP] if args.quick else first
        times = Bench(lab, asked, warm_up).run(args.quick)
    if not args.json_only:
        Console().print(times.table(args.tokens))
    return finish("ttft", times.results(), times.bars(), verdicts=not args.json_only)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two prompts, four workers: a first look")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for `cairn up`")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="vLLM's --dtype")
    parser.add_argument("--tokens", type=int, default=3000, help="of each prompt")
    parser.add_argument("--prompts", type=int, default=0, help="default 5, quick 2")
    parser.add_argument("--json-only", action="store_true", help="print nothing but the JSON line")
    args = parser.parse_args(argv)
    return sentence_on_failure(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
