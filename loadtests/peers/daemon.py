"""LMCache 0.5.6 as a bench sees it: its daemon, and a vLLM worker that uses it.

Set up as its own help and messages ask for on the CPU: the daemon first (vLLM waits for it without end),
engine_driven transfer through shared memory, the same chunk size as Cairn's.  Nothing is phoned home.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console

from gateway.launch.processes import Child, Spec, kill_group
from gateway.launch.valkey import free_port
from loadtests.engine import CHUNK, NO_DEVICE_CACHE, BenchFailed, Engine, Lab, healthy, without_ours
from loadtests.peers.venv import ensure

VERSION = "0.5.6"
# With --no-deps: its full list brings CUDA 13 and forty packages that the CPU path never imports.
PACKAGES = (
    f"lmcache=={VERSION}", "redis==8.1.0", "hiredis==3.5.0", "sortedcontainers==2.4.0", "aiofile==3.12.3",
    "aiofiles==25.1.0", "caio==0.12.10", "nvtx==0.2.17", "py-cpuinfo==9.0.0", "cachetools==8.0.1",
    "grpcio==1.85.1", "grpcio-observability==1.78.0", "opentelemetry-exporter-prometheus==0.66b2",
    "protobuf==6.33.6",
)  # fmt: skip
OWN, LENT = ("lmcache", "redis", "google.protobuf", "grpc"), ("vllm", "torch")
QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "VLLM_PLUGINS": ""}
_L1_GIB = 2
_SETTLE_SECONDS = 60.0
_START_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the daemon says about itself."""

    chunks: int
    busy: int  # chunks being written, or waiting for a lower tier

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> "Stored":
        """From the JSON of its /status page."""
        manager = status["storage_manager"]
        above, below = manager["l1_manager"], manager["store_controller"]
        busy = above["write_locked_count"] + below["pending_keys_count"] + below["in_flight_task_count"]
        return cls(chunks=int(above["total_object_count"]), busy=int(busy))


class Daemon:
    """A running `lmcache server`."""

    def __init__(self, child: Child, port: int, http: httpx.Client) -> None:
        self._child, self.port, self._http = child, port, http

    def stored(self) -> Stored:
        """Raises BenchFailed when the daemon does not say."""
        try:
            return Stored.of(self._http.get("/status").json())
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            raise BenchFailed(f"{self._child.name} does not tell its status: {exc!r}") from exc

    def settled(self, chunks: int) -> float:
        """Wait until it holds `chunks` chunks and writes none; seconds waited.  Raises BenchFailed."""
        began = time.monotonic()
        while True:
            now = self.stored()
            if now.chunks >= chunks and not now.busy:
                return time.monotonic() - began
            if time.monotonic() - began > _SETTLE_SECONDS:
                raise BenchFailed(f"LMCache holds {now.chunks} of {chunks} chunks and is writing {now.busy}")
            time.sleep(0.1)

    def kill(self) -> None:
        kill_group(self._child.pid)


class Peer:
    """A worker with LMCache behind it.  What is no hit is told, not refused: that is the measurement."""

    def __init__(self, engine: Engine, daemon: Daemon) -> None:
        self.engine, self.daemon = engine, daemon

    def asked(self, prompt: Sequence[int]) -> tuple[float, int]:
        """TTFT in seconds, and how many tokens of the prompt vLLM says it did not compute."""
        answer = self.engine.ask(prompt)
        return answer.ttft, answer.cached_tokens

    def kill(self) -> None:
        self.engine.kill()
        self.daemon.kill()


class PeerLab(Lab):
    """A Lab that can also start LMCache."""

    def __init__(
        self,
        console: Console,
        *,
        model: str,
        dtype: str = "auto",
        venv: Path | None = None,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(console, model=model, dtype=dtype)
        self._venv = venv or self._root / "peers" / "lmcache"
        self.chunk = chunk  # LMCache's

    def install(self) -> None:
        """Its virtual environment.  Raises BenchFailed."""
        self.python = ensure(self._venv, PACKAGES, OWN, LENT, self.board)

    @contextlib.contextmanager
    def peer(self, name: str, *lower: Mapping[str, str | int], secret: str = "") -> Iterator[Peer]:
        """A daemon with these L2 adapters below its memory, and a worker in front of it."""
        with (
            self._daemon(f"{name}-daemon", lower, secret) as daemon,
            self.engine(
                name,
                None,
                *NO_DEVICE_CACHE,
                "--kv-transfer-config",
                json.dumps(transfer_config(daemon.port)),
                python=str(self.python),
                env=QUIET,
            ) as engine,
        ):
            yield Peer(engine, daemon)

    @contextlib.contextmanager
    def _daemon(self, name: str, lower: Sequence[Mapping[str, str | int]], secret: str) -> Iterator[Daemon]:
        port, admin = free_port(), free_port()
        shared = f"cairn-bench-{os.getpid()}-{port}"
        argv = daemon_command(self._venv / "bin" / "lmcache", port, admin, shared, self.chunk, lower)
        with httpx.Client(base_url=f"http://127.0.0.1:{admin}", timeout=5.0, trust_env=False) as http:
            spec = Spec(
                name=name,
                argv=argv,
                log=self._log(name),
                ready=lambda: healthy(http, "/healthcheck"),
                # a password goes here, not into argv
                env={**without_ours(os.environ), **QUIET, "LMCACHE_RESP_PASSWORD": secret},
                deadline_seconds=_START_SECONDS,
            )
            try:
                with self._running(spec) as child:
                    yield Daemon(child, port, http)
            finally:
                for left in Path("/dev/shm").glob(f"*{shared}"):  # kill -9 leaves its memory behind
                    left.unlink()


def daemon_command(
    program: Path, port: int, admin: int, shared: str, chunk: int, lower: Sequence[Mapping[str, str | int]]
) -> tuple[str, ...]:
    argv = [str(program), "server", "--host", "127.0.0.1", "--port", str(port), "--http-port", str(admin)]
    argv += ["--chunk-size", str(chunk), "--supported-transfer-mode", "engine_driven", "--shm-name", shared]
    argv += ["--l1-size-gb", str(_L1_GIB), "--eviction-policy", "LRU"]
    argv += ["--disable-metrics", "--disable-grpc-metrics"]
    for adapter in lower:
        argv += ["--l2-adapter", json.dumps(adapter)]
    return tuple(argv)


def transfer_config(port: int) -> dict[str, object]:
    """vLLM's --kv-transfer-config for the daemon at `port`; a failed load is recomputed, as in Cairn's."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
            "lmcache.mp.mp_transfer_mode": "engine_driven",
        },
    }


def on_disk(folder: Path) -> dict[str, str | int]:
    """Its native file adapter: one file a chunk, found again by name after a restart."""
    return {"type": "fs_native", "base_path": str(folder)}


def in_redis(url: str) -> tuple[dict[str, str | int], str]:
    """Its native RESP adapter and the password to start the daemon with."""
    parts = urlsplit(url)
    return {"type": "resp", "host": parts.hostname or "", "port": parts.port or 6379}, parts.password or ""


def forget_pages(folder: Path) -> None:
    """Write out and drop what the kernel caches of these files, so that a read comes from the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def remember_pages(folder: Path) -> None:
    """Read all of these files, so that the next read comes from the kernel's memory."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.read_bytes()
