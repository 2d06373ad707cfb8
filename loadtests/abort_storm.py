"""Clients that hang up at every possible moment, on real processes: is anything left behind?   [--quick]

The question: 10,000 requests are aborted at random points (amid their headers, amid their body, while they
wait in the gateway's queue or the worker's, before the first byte, in mid-stream, with FIN and with RST;
streamed and not), and some are heard to the end among them.  Does every one of them give back what it held?

Aborted requests ask for answers that would last minutes, so a worker finishes exactly those that were heard
whole; every other request that reached one must have been hung up on there: requests - heard = aborted.

Bars: no difference in that equation; afterwards nothing in flight, nothing queued, no row on the load board,
nothing running on the workers; no retry; the gateway's memory flat between the first fifth and the end.
"""

import argparse
import asyncio
import json
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET

from rich.console import Console

from loadtests.engine import BenchFailed, sentence_on_failure
from loadtests.mocks import Gateway, MockLab, stats
from loadtests.report import Bar, finish

FOREVER, SHORT = 100_000, 3  # tokens of an answer
CLIENTS = 96
SEATS = 16  # of a worker: most clients wait in the gateway's queue
FLAT_MIB = 8.0
_SETTLE_SECONDS = 60.0
_WEIGHTS = {"head": 1, "body": 2, "sent": 6, "first": 4, "middle": 4, "whole": 3}
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
_HEARD_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """One client: how far it goes before it hangs up."""

    moment: str  # head, body: amid sending them; sent: after; first, middle: that was heard; whole: no abort
    stream: bool
    chat: bool
    reset: bool
    patience: float  # seconds between sending and hanging up
    share: float  # of what is sent in parts; of what is heard in mid-stream
    model: str = "mock"
    forever: int = FOREVER  # tokens

    @classmethod
    def draw(cls, rng: random.Random, model: str = "mock", forever: int = FOREVER) -> "Plan":
        (moment,) = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        stream = (
            moment in ("first", "middle") or rng.random() < 0.5
        )  # the others have a first byte only at the end
        return cls(
            moment,
            stream,
            rng.random() < 0.5,
            rng.random() < 0.3,
            rng.choice((0.0, rng.random() / 20)),
            rng.random(),
            model,
            forever,
        )

    def request(self) -> tuple[bytes, bytes]:
        """Head and body."""
        tokens = SHORT if self.moment == "whole" else self.forever
        text = "stone upon stone " * 12
        asked: dict[str, object] = {
            "model": self.model,
            "stream": self.stream,
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        asked |= {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
        body = json.dumps(asked).encode()
        path = "chat/completions" if self.chat else "completions"
        head = f"POST /v1/{path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode(), body


async def play(plan: Plan, host: str, port: int) -> str:
    """Be that client; the moment it got to, or `refused` with the status.  Raises OSError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head, body = plan.request()
        sent = {"head": head, "body": body}.get(plan.moment, b"")
        part = sent[: int(len(sent) * plan.share)]
        if plan.moment == "head":
            writer.write(part)
        else:
            writer.write(head + (part if plan.moment == "body" else body))
        await writer.drain()
        if plan.moment in ("head", "body", "sent"):
            await asyncio.sleep(plan.patience)
        else:
            async with asyncio.timeout(_HEARD_SECONDS):
                await _hear(plan, reader)
        return plan.moment
    except Refused as exc:
        return f"refused {exc.args}"
    finally:
        if plan.reset:
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, _RESET)
        writer.close()


class Refused(Exception):
    """Status and text of an answer that is none of a worker's."""


async def _hear(plan: Plan, reader: asyncio.StreamReader) -> None:
    """As much of the answer as the plan says.  Raises Refused."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Refused(head.split()[1].decode(), await reader.read(200))
    if plan.moment == "first":
        await reader.read(1)
    elif plan.moment == "middle":
        for _ in range(2 + int(plan.share * 18)):
            await reader.readuntil(b"\n\n")
    elif plan.stream:
        await reader.readuntil(b"data: [DONE]\n\n")
    else:
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if line)
        await reader.readexactly(int(fields[b"content-length"]))


async def storm(
    plans: Sequence[Plan], host: str, port: int, watch: Callable[[float], None] = lambda share: None,
    clients: int = CLIENTS,
) -> Counter[str]:  # fmt: skip
    """All plans, so many `clients` at a time; how many got to which moment.  `watch` hears how far it is."""
    told: Counter[str] = Counter()
    waiting = iter(plans)
    done = 0

    async def client() -> None:
        nonlocal done
        for plan in waiting:
            try:
                told[await play(plan, host, port)] += 1
            except (OSError, EOFError, TimeoutError) as exc:
                told[f"failed {type(exc).__name__}"] += 1
            done += 1
            watch(done / len(plans))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return told


def left(gateway: Gateway, urls: Sequence[str]) -> dict[str, float]:
    """What is still held, by whom."""
    metrics, workers = gateway.metrics(), stats(urls)
    return {
        "inflight": metrics["cairn_gateway_inflight_requests"],
        "queued": metrics["cairn_gateway_queue_requests"],
        "board": sum(row["inflight"] for row in gateway.workers()),
        "working": workers["running"] + workers["waiting"],
    }


def settled(gateway: Gateway, urls: Sequence[str]) -> dict[str, float]:
    """The same, once it is nothing, or after a minute."""
    until = time.monotonic() + _SETTLE_SECONDS
    while any((held := left(gateway, urls)).values()) and time.monotonic() < until:
        time.sleep(0.1)
    return held


class Memory:
    """The gateway's, at a fifth of the way and at the end."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self.early = gateway, 0.0

    def __call__(self, share: float) -> None:
        if share >= 0.2 and not self.early:
            self.early = self._gateway.rss_mib()

    def growth(self) -> float:
        """MiB."""
        return self._gateway.rss_mib() - self.early


def run(requests: int, seed: int, console: Console) -> int:
    rng = random.Random(seed)
    plans = [Plan.draw(rng) for _ in range(requests)]
    with (
        MockLab(console) as lab,
        lab.mocks(2, prefill_rate=40_000, decode_rate=500) as urls,
        lab.gateway(urls, worker_seats=SEATS, max_queue=4 * CLIENTS) as gateway,
    ):
        memory, began = Memory(gateway), time.monotonic()
        told = asyncio.run(storm(plans, gateway.host, gateway.port, memory))
        seconds = time.monotonic() - began
        held = settled(gateway, urls)
        workers, retries = stats(urls), gateway.metrics().get("cairn_gateway_retries_total", 0.0)
        growth = memory.growth()
    if told["whole"] == 0 or memory.early == 0:
        raise BenchFailed(f"nobody was answered: {dict(told)}")
    console.print(f"{requests} clients in {seconds:.0f} s: {dict(told)}")
    console.print(f"workers: {workers}; left: {held}; memory {memory.early:.0f} MiB {growth:+.1f}")
    unheard = workers["requests"] - told["whole"]
    aborts = sum(told[moment] for moment in ("sent", "first", "middle"))
    results = {
        "requests": requests, "seconds": seconds, "reached a worker": workers["requests"],
        "heard whole": told["whole"], "aborted at a worker": workers["aborted"], "growth MiB": growth,
    }  # fmt: skip
    odd = sum(count for what, count in told.items() if what not in _WEIGHTS)
    bars = {
        "aborts missing at the workers": Bar(abs(unheard - workers["aborted"]), 0, "lower"),
        "answers finished for nobody": Bar(abs(workers["finished"] - told["whole"]), 0, "lower"),
        "heard by clients, not aborted": Bar(
            max(0, told["first"] + told["middle"] - workers["aborted"]), 0, "lower"
        ),
        "aborts nobody made": Bar(max(0, workers["aborted"] - aborts), 0, "lower"),
        "refused or failed": Bar(odd, 0, "lower"),
        "retries": Bar(retries, 0, "lower"),
        "growth MiB": Bar(growth, FLAT_MIB, "lower"),
        **{f"left: {name}": Bar(value, 0, "lower") for name, value in held.items()},
    }
    return finish("abort_storm", results, bars)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="1,000 requests")
    args = parser.parse_args(argv)
    requests = 1000 if args.quick else args.requests
    return sentence_on_failure(lambda: run(requests, args.seed, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
