"""The parts of a stack, in the order they start: Valkey, then the workers and the gateway side by side."""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import httpx

from gateway.launch import state, worker
from gateway.launch.board import Board
from gateway.launch.checks import preflight, redis_sentence
from gateway.launch.config import LaunchConfig
from gateway.launch.errors import LaunchError
from gateway.launch.model import Model, prepare
from gateway.launch.processes import Child, Guard, Spec, stop_all, wait_ready
from gateway.launch.supervise import Supervisor
from gateway.launch.valkey import Valkey

_PROBE_SECONDS = 1.0
_WORKER_DEADLINE_SECONDS = 900.0
# Settings of the launcher itself (and a gateway's static fleet): the parts get theirs as flags.
_OURS = {
    f"CAIRN_{name}"
    for name in ("CONFIG", "HOME", "MODEL", "PORT", "WORKERS", "WORKER_COUNT", "DISK_PATH", "WORKER_ID")
}
# A router that shares its cores with the workers' arithmetic answers late; seconds of prefill are at stake.
_INDEX_DEADLINE_MS = 100.0


class Signals:
    """Ctrl-C and SIGTERM, noticed between two polls.  The second one stops without grace."""

    def __init__(self) -> None:
        self.count = 0
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means: stay
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def stopping(self) -> bool:
        return self.count > 0

    def impatient(self) -> bool:
        return self.count > 1


class Stack:
    """Everything that runs for one `cairn up`."""

    def __init__(
        self,
        config: LaunchConfig,
        env: Mapping[str, str],
        board: Board,
        *,
        connector: bool = True,
    ) -> None:
        self.config = config
        self.env = {name: value for name, value in env.items() if name not in _OURS}
        self.board = board
        self.signals = Signals()
        self.children: list[Child] = []
        self._connector = connector
        self._guard: Guard | None = None

    def run(self, greet: Callable[[Model], None]) -> int:
        """Start, serve until told to stop, stop.  Returns the exit code.

        Raises LaunchError when it cannot start, or when nothing is left that could serve.
        """
        with state.owned(self.config.root):
            try:
                with self.board:
                    model = self._start()
                if model and not self.signals.stopping():
                    greet(model)
                    Supervisor(self.children, self.board.say, self.signals.stopping).run()
                return 0
            except LaunchError:
                if self.signals.stopping():  # Ctrl-C reached a helper process first
                    return 0
                raise
            finally:
                self._stop()

    def _start(self) -> Model | None:
        """None when told to stop half way."""
        board, config = self.board, self.config
        board.begin("preflight")
        preflight(config)
        if config.redis_url and (sentence := redis_sentence(config.redis_url)):
            raise LaunchError(sentence)
        board.done("preflight", "ports, memory, disk, compiler")
        board.begin("model")
        model = prepare(config.model, config.root, board.say)
        board.done("model", str(model.path))
        self._guard = Guard()
        redis_url = config.redis_url
        if not redis_url:
            valkey = Valkey.fresh(int(config.redis_bytes))
            redis_url = valkey.url
            if not self._bring_up([valkey.spec(config.root / "run", self._log("valkey"))]):
                return None
        workers = worker_specs(config, model, redis_url)
        specs = [self._worker_part(f"w{i + 1}", spec) for i, spec in enumerate(workers)]
        specs.append(self._gateway_part(model, redis_url, [spec.url for spec in workers]))
        if not self._bring_up(specs):
            return None
        self._leave_note(redis_url)
        return model

    def _bring_up(self, specs: list[Spec]) -> bool:
        """Start all at once: most of a start is single threaded, so they overlap well even on two cores."""
        fresh = [Child(spec, self._guard) for spec in specs]
        for child in fresh:
            self.board.begin(child.name, child.spec.note)
            self.children.append(child)
            child.start()
        return wait_ready(fresh, lambda c: self.board.done(c.name, f"pid {c.pid}"), self.signals.stopping)

    def _worker_part(self, name: str, spec: worker.WorkerSpec) -> Spec:
        return Spec(
            name=name,
            argv=worker.command(spec, connector=self._connector),
            log=self._log(name),
            ready=lambda: answers(f"{spec.url}/health"),
            note="the first time, vLLM compiles the model: a minute or two",
            env=worker.environment(spec, self.env),
            deadline_seconds=_WORKER_DEADLINE_SECONDS,
            grace_seconds=15.0,
        )

    def _gateway_part(self, model: Model, redis_url: str, worker_urls: list[str]) -> Spec:
        config = self.config
        name = config.served_model_name or model.name
        flags: dict[str, object] = {
            "host": "127.0.0.1",
            "port": config.port,
            "tokenizer_path": str(model.path),
            "index_deadline_ms": _INDEX_DEADLINE_MS,
        }
        if config.admin_port:
            flags["admin_port"] = config.admin_port
        if not self._connector:  # plain vLLM does not register itself
            flags["workers"] = [f"{name}={url}" for url in worker_urls]
        return Spec(
            name="gateway",
            argv=(sys.executable, "-m", "gateway.launch.serve", json.dumps(flags)),
            log=self._log("gateway"),
            ready=lambda: answers(f"{config.url}/health/ready"),
            env=self.env | {"CAIRN_REDIS_URL": redis_url} | _secrets(config),
            deadline_seconds=_WORKER_DEADLINE_SECONDS + 60.0,  # it is ready once a worker is
        )

    def _log(self, name: str) -> Path:
        return self.config.root / "logs" / f"{name}.log"

    def _leave_note(self, redis_url: str) -> None:
        note = state.Stack(
            pid=os.getpid(),
            url=self.config.url,
            redis_url=redis_url,
            disk=str(self.config.root / "disk") if self.config.disk_bytes else "",
            parts={child.name: child.pid for child in self.children},
        )
        state.write(self.config.root, note)

    def _stop(self) -> None:
        """The gateway first, so that nobody is sent to a worker on its way out; Valkey last."""
        if self.children and not self.signals.impatient():
            self.board.say("stopping …")
        grace = 0.0 if self.signals.impatient() else None
        waves = [
            [child for child in self.children if child.name == "gateway"],
            [child for child in self.children if child.name not in ("gateway", "valkey")],
            [child for child in self.children if child.name == "valkey"],
        ]
        for wave in waves:
            stop_all(wave, grace, self.signals.impatient)
        if self._guard:
            self._guard.close()


def worker_specs(config: LaunchConfig, model: Model, redis_url: str) -> list[worker.WorkerSpec]:
    """One spec per worker.  Ids are stable (w1, w2 …), so a restart finds its disk tier again."""
    limit = model.context_tokens
    length = min(config.max_model_len, limit) if limit else config.max_model_len
    cores = worker.core_lists(sorted(os.sched_getaffinity(0)), config.worker_count)
    specs = []
    for i, port in enumerate(config.worker_ports):
        name = f"w{i + 1}"
        cache: dict[str, str | int] = {
            "worker_id": name,
            "worker_url": f"http://127.0.0.1:{port}",
            "chunk_tokens": config.chunk_tokens,
            "host_bytes": int(config.host_bytes),
        }
        if config.disk_bytes:
            cache |= {"disk_path": str(config.root / "disk" / name), "disk_bytes": int(config.disk_bytes)}
        specs.append(
            worker.WorkerSpec(
                model=str(model.path),
                port=port,
                served_name=config.served_model_name or model.name,
                dtype=config.dtype,
                max_model_len=length,
                cores=cores[i],
                redis_url=redis_url,
                cache=cache,
            )
        )
    return specs


def answers(url: str) -> bool:
    """200 within a second."""
    try:
        return httpx.get(url, timeout=_PROBE_SECONDS, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _secrets(config: LaunchConfig) -> dict[str, str]:
    """What a gateway is told in its environment, because argv is for everybody to read."""
    token = config.admin_token.get_secret_value()
    return {"CAIRN_ADMIN_TOKEN": token} if token else {}
