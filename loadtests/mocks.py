"""A gateway process in front of mock workers: what benches of the gateway alone start."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from gateway.launch.processes import Spec
from gateway.launch.valkey import free_port
from loadtests.engine import Lab, healthy, totals, without_ours
from loadtests.memory import of_group
from loadtests.mock_worker import build


@dataclass(frozen=True)
class Gateway:
    """A gateway: `pid` leads the group of its processes."""

    host: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def rss_mib(self) -> float:
        """Of all of its processes."""
        return of_group(self.pid)

    def metrics(self) -> dict[str, float]:
        """Its exposition, summed over labels."""
        return totals(httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text)

    def workers(self) -> list[dict[str, Any]]:
        """As /admin/workers shows them."""
        page = httpx.get(f"{self.url}/admin/workers", timeout=30, trust_env=False).json()
        return list(page["workers"])


def stats(urls: Sequence[str]) -> dict[str, int]:
    """The mock workers' counters, summed."""
    found = [httpx.get(f"{url}/mock/stats", timeout=30, trust_env=False).json() for url in urls]
    return {name: sum(one[name] for one in found) for name in found[0]}


class MockLab(Lab):
    """A Lab with mock workers instead of engines."""

    @contextlib.contextmanager
    def mocks(self, count: int, redis_url: str = "", **flags: float) -> Iterator[list[str]]:
        """Fresh mock workers with empty caches, in one process; yields their URLs."""
        build(self._root / "bench")
        words = self.folder / "words"
        words.mkdir(exist_ok=True)
        ports = [free_port() for _ in range(count)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        argv = [sys.executable, "-m", "loadtests.mock_worker", "--folder", str(words)]
        argv += ["--ports", ",".join(map(str, ports))]
        for name, value in flags.items():
            argv += [f"--{name.replace('_', '-')}", str(value)]
        env = {**without_ours(os.environ), "CAIRN_REDIS_URL": redis_url}
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=url, trust_env=False)) for url in urls]
            ready = lambda: all(map(healthy, clients))  # noqa: E731
            with self._running(Spec("mocks", tuple(argv), self._log("mocks"), ready, env)):
                yield urls

    @contextlib.contextmanager
    def gateway(self, urls: Sequence[str], **knobs: object) -> Iterator[Gateway]:
        """A gateway that knows these workers by its configuration, and nothing else."""
        port = free_port()
        flags = {"port": port, "workers": [f"mock={url}" for url in urls], "log_level": "warning", **knobs}
        argv = (sys.executable, "-m", "gateway.launch.serve", json.dumps(flags))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            spec = Spec(
                "gateway", argv, self._log("gateway"), lambda: healthy(client, "/health/ready"),
                without_ours(os.environ),
            )  # fmt: skip
            with self._running(spec) as child:
                yield Gateway("127.0.0.1", port, child.pid)
