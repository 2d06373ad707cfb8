"""Starts mock workers and, in front of them, one gateway after another: Cairn's own and its peers'."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from gateway.launch.processes import Child, Spec
from gateway.launch.valkey import free_port
from loadtests.engine import BenchFailed, Lab, without_ours
from loadtests.mock_worker import build
from loadtests.peers.venv import ensure

PACKAGES = ("vllm-router==0.1.17", "smg==1.13.0", "setproctitle==1.3.8", "orjson==3.13.0")
OWN = ("vllm_router", "smg", "setproctitle")
LENT = ("uvicorn", "fastapi", "aiohttp")
_READY_SECONDS = 30.0
_SESSION = "x-session-id: {session}\r\n"
CAIRN = "cairn"
VLLM, SMG = "vllm-router", "smg"
CARRIERS = ("httpx", "httpx-aiohttp", "aiohttp")  # Cairn over other HTTP clients: loadtests/transports.py


@dataclass(frozen=True)
class Fleet:
    """What the mock workers are."""

    workers: int = 4
    prefill_rate: float = 16_000
    decode_rate: float = 100
    chunk_tokens: int = 32
    capacity: int = 5600  # chunks a worker


@dataclass(frozen=True)
class Router:
    """One gateway with one policy."""

    side: str
    policy: str
    flags: tuple[str, ...] = ()
    headers: str = ""

    @property
    def name(self) -> str:
        return f"{self.side} {self.policy}"


# Each peer with its cache-aware policy as it comes, the same with balance thresholds for a fleet of this size
# (its own, 64 requests apart, are never reached by four workers), and with its other good policies.
_TIGHT = ("--balance-abs-threshold", "4", "--balance-rel-threshold", "1.2")
_POLLED = ("--load-monitor-interval", "1")
ROUTERS = {
    router.name: router
    for router in (
        Router(CAIRN, "predicted_ttft"),
        Router(CAIRN, "predicted_ttft, patient", ("index_deadline_ms", "20")),
        Router(VLLM, "cache_aware"),
        Router(VLLM, "cache_aware, tight", _TIGHT),
        Router(VLLM, "consistent_hash", headers=_SESSION),
        Router(VLLM, "power_of_two"),
        Router(SMG, "cache_aware", _POLLED),
        Router(SMG, "cache_aware, tight", (*_POLLED, *_TIGHT)),
        Router(SMG, "prefix_hash", _POLLED),
        Router(SMG, "consistent_hashing", (*_POLLED, "--routing-key-headers", "x-session-id"), _SESSION),
        Router(SMG, "power_of_two", _POLLED),
        Router(SMG, "least_load", _POLLED),
    )
}


@dataclass(frozen=True)
class Counts:
    """What the mock workers counted, one entry a worker."""

    requests: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int

    def since(self, before: "Counts") -> "Counts":
        return Counts(
            tuple(now - then for now, then in zip(self.requests, before.requests, strict=True)),
            self.prompt_tokens - before.prompt_tokens,
            self.cached_tokens - before.cached_tokens,
        )

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def hotspot(self) -> float:
        """Workers times the largest share of requests: 1 is even."""
        return len(self.requests) * max(self.requests) / max(1, sum(self.requests))


class RouterLab(Lab):
    """A Lab with mock workers and other people's gateways."""

    def __init__(self, console: Console, fleet: Fleet, venv: Path | None = None) -> None:
        super().__init__(console)
        self.fleet = fleet
        self._venv = venv or self._root / "peers" / "routers"

    def install(self) -> None:
        """The peers' virtual environment and the native mock.  Raises BenchFailed."""
        ensure(self._venv, PACKAGES, OWN, LENT, self.board)
        self.programs = self._root / "bench"
        build(self.programs)
        self.words = self.folder / "words"
        self.words.mkdir()
        self._ports = [free_port() for _ in range(self.fleet.workers)]

    @contextlib.contextmanager
    def workers(self, redis_url: str) -> Iterator[list[str]]:
        """Fresh mock workers, with empty caches; yields their URLs."""
        fleet = self.fleet
        urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        argv = [sys.executable, "-m", "loadtests.mock_worker", "--folder", str(self.words)]
        argv += ["--ports", ",".join(map(str, self._ports)), "--capacity", str(fleet.capacity)]
        argv += ["--prefill-rate", str(fleet.prefill_rate), "--decode-rate", str(fleet.decode_rate)]
        argv += ["--chunk-tokens", str(fleet.chunk_tokens)]
        spec = Spec(
            name="mocks",
            argv=tuple(argv),
            log=self._log("mocks"),
            ready=lambda: all(_ok(f"{url}/health") for url in urls),
            env={**without_ours(os.environ), "CAIRN_REDIS_URL": redis_url},
        )
        with self._running(spec):
            yield urls

    @contextlib.contextmanager
    def router(self, router: Router, urls: Sequence[str], redis_url: str) -> Iterator[tuple[Child, int]]:
        """That gateway in front of these workers, once it answers; yields its process and its port.
        Without a Redis, Cairn is told the workers, and makes no keys."""
        port, metrics = free_port(), free_port()
        env = without_ours(os.environ)
        if router.side in (CAIRN, *CARRIERS):
            flags = {"port": port, "policy": _bare(router.policy), "log_level": "warning"}
            if not redis_url:
                flags["workers"] = ",".join(f"mock={url}" for url in urls)
            flags |= dict(zip(router.flags[::2], router.flags[1::2], strict=True))
            program = (
                ("gateway.launch.serve",) if router.side == CAIRN else ("loadtests.transports", router.side)
            )
            argv: Sequence[str] = (sys.executable, "-m", *program, json.dumps(flags))
            env["CAIRN_REDIS_URL"] = redis_url
        else:
            theirs = str(self._venv / "bin" / router.side)
            argv = (theirs, *(("launch",) if router.side == SMG else ()), "--host", "127.0.0.1")
            argv = (*argv, "--port", str(port), "--worker-urls", *urls, "--policy", _bare(router.policy))
            argv = (*argv, "--prometheus-port", str(metrics), "--log-level", "error", *router.flags)
        spec = Spec(
            name=router.side,
            argv=tuple(argv),
            log=self._log(router.side),
            ready=lambda: _ok(f"http://127.0.0.1:{port}/health"),
            env=env,
        )
        with self._running(spec) as child:
            _greet(port, keyed=router.side == CAIRN and bool(redis_url), workers=len(urls))
            yield child, port


def counts(urls: Sequence[str]) -> Counts:
    """As of now."""
    found: list[Mapping[str, int]] = [httpx.get(f"{url}/mock/stats").json() for url in urls]
    return Counts(
        tuple(stats["requests"] for stats in found),
        sum(stats["prompt_tokens"] for stats in found),
        sum(stats["cached_tokens"] for stats in found),
    )


def cpu_seconds(group: int) -> float:
    """User and system time of a process group so far (/proc, proc(5))."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _bare(policy: str) -> str:
    return policy.partition(",")[0]


def _ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _greet(port: int, keyed: bool, workers: int) -> None:
    """Wait until a request is answered; Cairn's also until it names chunks.  Raises BenchFailed."""
    ask = {"model": "mock", "prompt": " hello" * 40, "max_tokens": 1, "stream": True}
    until = time.monotonic() + _READY_SECONDS
    good = 0
    while time.monotonic() < until:
        reply = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json=ask, headers={"x-cairn-explain": "1"}, timeout=10
        )
        known = not keyed or reply.headers.get("x-cairn-reason") in ("hit", "cold")
        good = good + 1 if reply.status_code == httpx.codes.OK and known else 0
        if good >= workers:
            return
        time.sleep(0.2)
    raise BenchFailed(f"the gateway on port {port} does not serve: {reply.status_code} {reply.text[:200]}")
