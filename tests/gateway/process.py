"""A gateway as a process of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import wait_until
from tests.servers import free_port


@dataclass
class Gateway:
    """One real process."""

    port: int
    pid: int
    log: Path

    def connect(self) -> socket.socket:
        caller = socket.create_connection(("127.0.0.1", self.port))
        caller.settimeout(60)
        return caller

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=30, trust_env=False)

    def inflight(self) -> float:
        lines = self.get("/metrics").text.splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith("cairn_gateway_inflight_requests "))
        return float(value)

    def rss(self) -> int:
        """Bytes."""
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self.pid, *self.serving())
        ]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def serving(self) -> list[int]:
        """The processes that serve, each with a pid of its own."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


@contextlib.contextmanager
def started(
    folder: Path, *workers: str, env: Mapping[str, str] | None = None, **knobs: Any
) -> Iterator[Gateway]:
    """A gateway in front of `workers`, as `model=http://host:port`; ready once one of them is."""
    port, log = free_port(), folder / "gateway.log"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    argv = [sys.executable, "-m", "gateway.launch.serve"]
    argv.append(json.dumps({"port": port, "workers": workers, **knobs}))
    with (
        log.open("wb") as out,
        subprocess.Popen(argv, env=ours | dict(env or {}), stdout=out, stderr=out) as process,
    ):
        gateway = Gateway(port, process.pid, log)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                return gateway.get("/health/ready").status_code == 200
            return False

        try:
            wait_until(ready, 60)
            yield gateway
        finally:
            process.terminate()
            process.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()
