"""Twice what the workers can do, from two tenants, one of them greedy: who gets what?   [--quick]

The question: when two tenants together ask for 2 × capacity, one of them for three quarters of it, do the
workers stay busy, does each tenant get its half, does the queue keep its bound, and does the official SDK
know every refusal for what it is?  The ceiling: what one tenant gets from the same workers in a closed loop.

Real processes: the gateway with API keys, two mock workers (loadtests/mock_worker.py) that compute prompts
one at a time, every prompt new to them.  Requests are sent when due, answered or not, by openai's client
without retries; beside them a few of the greedy tenant's by one that does: it waits as Retry-After says.

Bars: answers ≥ 0.9 of capacity; Jain's fairness index (Jain, Chiu, Hawe 1984) of the tenants' answers ≥ 0.95;
the queue never above max_queue; every refusal a RateLimitError or InternalServerError with a Retry-After.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import openai
import yaml
from rich.console import Console

from gateway.keyring import Key, new_key
from loadtests.engine import BenchFailed, sentence_on_failure
from loadtests.mocks import Gateway, MockLab
from loadtests.report import Bar, finish

PROMPT_WORDS, ANSWER_TOKENS = 100, 4
PREFILL_RATE = 2000  # tokens/s of a worker: 20 prompts
SEATS, QUEUE = 4, 64
GREEDY, MODEST = 1.5, 0.5  # of capacity
LIMITED_RPM = 3
_PATIENT = 12  # requests of those who retry
_WARM_SECONDS = 3.0  # until the queue is full, and not counted
_WORDS = ["stone", "path", "wind", "hill", "rain", "north", "water", "light", "house", "tree"]
_REFUSALS = {429: openai.RateLimitError, 503: openai.InternalServerError}


@dataclass
class Tally:
    """What became of one tenant's requests."""

    good: list[float] = field(default_factory=list)  # when answers were complete
    refused: Counter[str] = field(default_factory=Counter)  # by exception and status
    odd: list[str] = field(default_factory=list)  # what is no answer, and no refusal as it should be

    def between(self, start: float, end: float) -> int:
        return sum(start <= when < end for when in self.good)


class Tenant:
    """One caller with a key, as an application would: openai's client."""

    def __init__(self, gateway: Gateway, key: str, retries: int = 0, tally: Tally | None = None) -> None:
        self.tally, self._rng = tally or Tally(), random.Random(key)
        self.asked: list[tuple[float, httpx.Response]] = []
        http = httpx.AsyncClient(
            trust_env=False, limits=httpx.Limits(max_connections=None), timeout=60,
            event_hooks={"response": [self._note]} if retries else {},
        )  # fmt: skip
        self.sdk = openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=key, max_retries=retries, http_client=http
        )

    async def ask(self) -> None:
        prompt = " ".join(self._rng.choices(_WORDS, k=PROMPT_WORDS))
        try:
            await self.sdk.completions.create(model="mock", prompt=prompt, max_tokens=ANSWER_TOKENS)
        except openai.APIStatusError as exc:
            self.tally.refused[f"{type(exc).__name__} {exc.status_code} {exc.code}"] += 1
            if type(exc) is not _REFUSALS.get(exc.status_code) or not exc.code:
                self.tally.odd.append(repr(exc))
            elif int(exc.response.headers.get("retry-after", 0)) < 1:
                self.tally.odd.append(f"no Retry-After: {exc!r}")
        except openai.APIError as exc:
            self.tally.odd.append(repr(exc))
        else:
            self.tally.good.append(time.monotonic())

    async def _note(self, response: httpx.Response) -> None:
        self.asked.append((time.monotonic(), response))

    async def hasty(self) -> int:
        """REQUIRES: a client that retries, asked once.  How often it came back sooner than it was told to."""
        hasty = 0
        for (told, response), (again, _) in zip(self.asked, self.asked[1:], strict=False):
            hasty += again - told < float(response.headers.get("retry-after", 0))
        return hasty


async def open_loop(tenant: Tenant, rate: float, seconds: float, rng: random.Random) -> None:
    """Poisson arrivals; returns when all are answered."""
    async with asyncio.TaskGroup() as group:
        due, end = time.monotonic(), time.monotonic() + seconds
        while (due := due + rng.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(tenant.ask())


async def capacity(tenant: Tenant, seconds: float) -> float:
    """Answers a second with more clients than seats."""
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await tenant.ask()

    async with asyncio.TaskGroup() as group:
        for _ in range(6 * SEATS):
            group.create_task(client())
    if tenant.tally.odd or tenant.tally.refused:
        raise BenchFailed(f"not everybody was answered: {tenant.tally.odd[:1]} {tenant.tally.refused}")
    return tenant.tally.between(end - seconds * 0.8, end) / (seconds * 0.8)


async def deepest(gateway: Gateway, seconds: float) -> float:
    """Of the queue, looked at all the time."""
    most, end = 0.0, time.monotonic() + seconds
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        while time.monotonic() < end:
            lines = (await http.get(f"{gateway.url}/metrics")).text.splitlines()
            depths = [line.split()[1] for line in lines if line.startswith("cairn_gateway_queue_requests ")]
            most = max(most, float(depths[0]))
            await asyncio.sleep(0.2)
    return most


@dataclass
class Outcome:
    capacity: float
    greedy: float
    modest: float
    depth: float
    refused: Counter[str]
    odd: list[str]
    hasty: int
    retried: int

    @property
    def fairness(self) -> float:
        shares = (self.greedy, self.modest)
        return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) if any(shares) else 0.0


async def measure(gateway: Gateway, keys: Mapping[str, str], seconds: float, seed: int) -> Outcome:
    able = await capacity(Tenant(gateway, keys["alone"]), max(5.0, seconds / 3))
    greedy, modest = Tenant(gateway, keys["greedy"]), Tenant(gateway, keys["modest"])
    limited = Tenant(gateway, keys["limited"])
    patient = [Tenant(gateway, keys["greedy"], 2, greedy.tally) for _ in range(_PATIENT)]
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(open_loop(greedy, GREEDY * able, seconds, random.Random(seed)))
        group.create_task(open_loop(modest, MODEST * able, seconds, random.Random(seed + 1)))
        depth = group.create_task(deepest(gateway, seconds))
        await asyncio.sleep(_WARM_SECONDS)
        for each in [*patient, *[limited] * (2 * LIMITED_RPM)]:
            group.create_task(each.ask())
    window = began + _WARM_SECONDS, began + seconds
    span = seconds - _WARM_SECONDS
    everyone = [greedy, modest, limited]
    return Outcome(
        able,
        greedy.tally.between(*window) / span,
        modest.tally.between(*window) / span,
        depth.result(),
        sum((each.tally.refused for each in everyone), Counter()),
        [odd for each in everyone for odd in each.tally.odd],
        sum([await each.hasty() for each in patient]),
        sum(max(0, len(each.asked) - 1) for each in patient),
    )


def issue(path: Path) -> dict[str, str]:
    """A file of keys, one for each tenant; tenant → key."""
    keys, records = {}, []
    for tenant in ("alone", "greedy", "modest", "limited"):
        keys[tenant], digest = new_key()
        rpm = LIMITED_RPM if tenant == "limited" else 0
        records.append(msgspec.to_builtins(Key(id=tenant, tenant=tenant, digest=digest, rpm=rpm)))
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump({"secret": "", "keys": records}))
    return keys


def run(seconds: float, seed: int, console: Console) -> int:
    with MockLab(console) as lab, lab.mocks(2, prefill_rate=PREFILL_RATE, decode_rate=200) as urls:
        path = lab.folder / "keys.yaml"
        keys = issue(path)
        knobs = {"auth": "keys", "keys_file": str(path), "worker_seats": SEATS, "max_queue": QUEUE}
        with lab.gateway(urls, **knobs) as gateway:
            outcome = asyncio.run(measure(gateway, keys, seconds, seed))
    console.print(outcome)
    goodput = (outcome.greedy + outcome.modest) / outcome.capacity
    results = {
        "capacity req/s": outcome.capacity, "greedy req/s": outcome.greedy, "modest req/s": outcome.modest,
        "refused": outcome.refused.total(), "retries that waited": outcome.retried,
    }  # fmt: skip
    kinds = {what.split()[0] for what in outcome.refused}
    bars = {
        "goodput / capacity": Bar(goodput, 0.9),
        "fairness": Bar(outcome.fairness, 0.95),
        "deepest queue": Bar(outcome.depth, QUEUE, "lower"),
        "kinds of refusals": Bar(len(kinds), len(_REFUSALS)),
        "refusals the SDK cannot name": Bar(len(outcome.odd), 0, "lower"),
        "retries before Retry-After": Bar(outcome.hasty, 0, "lower"),
        "retries": Bar(outcome.retried, 1),
    }
    return finish("overload", results, bars)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of overload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="12 s")
    args = parser.parse_args(argv)
    seconds = 12.0 if args.quick else args.seconds
    return sentence_on_failure(lambda: run(seconds, args.seed, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
