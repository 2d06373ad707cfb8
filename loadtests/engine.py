"""Real vLLM workers for benches: started as `cairn worker` starts them, asked, and stopped whatever happens.

A machine is noisy; a claim is not.  proof() compares the worker's own counters with the tier a time is said
to belong to.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tokenizers import Tokenizer

from cacheengine.config import CONFIG_FILE_ENV, ConfigError
from gateway.launch.board import Board
from gateway.launch.config import DEFAULT_MODEL, LaunchConfig
from gateway.launch.errors import LaunchError
from gateway.launch.model import prepare
from gateway.launch.processes import Child, Guard, Spec, kill_group, wait_ready
from gateway.launch.valkey import Valkey, free_port
from gateway.launch.worker import WorkerSpec, command, environment
from loadtests.sse import Answer, StreamFailed
from loadtests.texts import MANUAL

GIB = 1 << 30
# vLLM's processes busy-wait for a second after their last message (shm_broadcast.SpinCondition)
_SPIN_SECONDS = 1.5
MAX_MODEL_LEN = 4096
CHUNK = int(LaunchConfig.model_fields["chunk_tokens"].default)  # as `make up` has it
BLOCK = 128  # tokens of vLLM's block on the CPU
TIERS = ("device", "host", "disk", "redis")
NO_DEVICE_CACHE = ("--no-enable-prefix-caching",)
# vLLM 0.32 cannot load on the CPU what it saved, and compiles anew at every start (110 s instead of 31 s)
_FASTER_START = {"VLLM_USE_AOT_COMPILE": "0"}
_START_SECONDS = 600.0  # the first time, vLLM compiles
_ANSWER_SECONDS = 300.0
_SETTLE_SECONDS = 60.0
_METRIC_SECONDS = 5.0
_HITS, _SAVED, _DROPPED = (
    f"cairn_engine_{name}_total" for name in ("hit_tokens", "saved_chunks", "dropped_chunks")
)


class BenchFailed(Exception):
    """The bench cannot say what it was asked: a sentence, not a measurement."""


class Engine:
    """One running worker."""

    def __init__(self, child: Child, http: httpx.Client, model: str) -> None:
        self._child, self.http, self._model = child, http, model

    def ask(self, prompt: Sequence[int], max_tokens: int = 2) -> Answer:
        """A streamed greedy completion of exactly `max_tokens`.  Raises BenchFailed."""
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        answer = Answer(time.perf_counter())
        try:
            with self.http.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != httpx.codes.OK:
                    raise BenchFailed(f"{self._child.name} said {reply.status_code}: {reply.read()[:200]!r}")
                for piece in reply.iter_raw():
                    answer.feed(piece, time.perf_counter())
            answer.finish()
        except (httpx.HTTPError, StreamFailed) as exc:
            raise BenchFailed(f"{self._child.name} did not answer: {exc}") from exc
        return answer

    def metrics(self) -> dict[str, float]:
        return totals(self.http.get("/metrics").text)

    def sources(self) -> dict[str, float]:
        """Prompt tokens this worker has taken from each tier so far."""
        found = self.metrics()
        hits = {tier: found.get(f"{_HITS} {tier}", 0.0) for tier in TIERS}
        return hits | {"device": found.get("vllm:prefix_cache_hits_total", 0.0)}

    def proved(self, prompt: Sequence[int], claim: str) -> float:
        """TTFT in seconds of a prompt that came from tier `claim`, or from none.  Raises BenchFailed."""
        before = self.sources()
        ttft = self.ask(prompt).ttft
        until = time.monotonic() + _METRIC_SECONDS
        while True:
            taken = {tier: tokens - before[tier] for tier, tokens in self.sources().items()}
            wrong = proof(claim, taken, len(prompt))
            if not wrong:
                return ttft
            if time.monotonic() > until:
                raise BenchFailed(f"{self._child.name}: {wrong}")
            time.sleep(0.05)

    def settled(self, chunks: int, *tiers: str) -> float:
        """Wait until each tier has stored `chunks` chunks; seconds waited.  Raises BenchFailed."""
        began = time.monotonic()
        while True:
            found = self.metrics()
            saved = {tier: found.get(f"{_SAVED} {tier}", 0.0) for tier in tiers}
            dropped = sum(found.get(f"{_DROPPED} {tier}", 0.0) for tier in tiers)
            if all(n >= chunks for n in saved.values()):
                return time.monotonic() - began
            if dropped or time.monotonic() - began > _SETTLE_SECONDS:
                raise BenchFailed(f"{self._child.name} saved {saved} of {chunks} chunks, dropped {dropped:g}")
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9 the whole process group."""
        kill_group(self._child.pid)


class Lab:
    """Everything a bench starts, in one `with`: it is all gone afterwards, also after Ctrl-C and SIGTERM."""

    def __init__(self, console: Console, *, model: str = DEFAULT_MODEL, dtype: str = "auto") -> None:
        self._console, self._dtype = console, dtype
        env = {name: value for name, value in os.environ.items() if name != CONFIG_FILE_ENV}
        self._root = LaunchConfig.load(env=env).root
        self._wanted = model
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _leave)
        with contextlib.ExitStack() as opening:
            self.board = Board(self._console)
            self.model = prepare(self._wanted, self._root, self.board.say)
            self.folder = Path(tempfile.mkdtemp(prefix="bench-", dir=self._root))
            opening.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._guard = Guard()
            opening.callback(self._guard.close)
            self._opened = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def token_ids(self) -> list[int]:
        """Python's manual, in the model's own token ids."""
        tokenizer = Tokenizer.from_file(str(self.model.path / "tokenizer.json"))
        return list(tokenizer.encode(MANUAL, add_special_tokens=False).ids)

    @contextlib.contextmanager
    def valkey(self, gib: int = 2) -> Iterator[str]:
        """A Valkey of our own; yields its URL."""
        valkey = Valkey.fresh(gib * GIB)
        with self._running(valkey.spec(self.folder, self._log("valkey"))):
            yield valkey.url

    @contextlib.contextmanager
    def engine(
        self,
        name: str,
        cache: Mapping[str, str | int] | None,
        *args: str,
        redis_url: str = "",
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Engine]:
        """A worker, ready; `cache=None` is plain vLLM.  `args` go to vLLM; a peer's `python` runs it."""
        port = free_port()
        worker = WorkerSpec(
            model=str(self.model.path), port=port, served_name="bench", dtype=self._dtype,
            max_model_len=MAX_MODEL_LEN, cores=cores(), redis_url=redis_url,
            # what a bench wants to time it must get, also where a noisy minute made a tier look slow
            cache={"worker_url": f"http://127.0.0.1:{port}", "loading": "always", **(cache or {})},
            extra=("--max-num-seqs", "8", *args),
        )  # fmt: skip
        with httpx.Client(base_url=worker.url, timeout=_ANSWER_SECONDS, trust_env=False) as http:
            spec = Spec(
                name=name,
                argv=(python, *command(worker, connector=cache is not None)[1:]),
                log=self._log(name),
                ready=lambda: healthy(http),
                env=environment(worker, _FASTER_START | without_ours(os.environ) | dict(env or {})),
                deadline_seconds=_START_SECONDS,
            )
            with self._running(spec) as child:
                yield Engine(child, http, worker.served_name)

    def disk(self, name: str, gib: int = 2) -> dict[str, str | int]:
        """Cache settings of a worker `name` with a folder of its own."""
        return {
            "worker_id": name,
            "chunk_tokens": CHUNK,
            "host_bytes": 2 * GIB,
            "disk_path": str(self.folder / name),
            "disk_bytes": gib * GIB,
        }

    @contextlib.contextmanager
    def _running(self, spec: Spec) -> Iterator[Child]:
        spec.log.unlink(missing_ok=True)
        child = Child(spec, self._guard)
        self.board.begin(spec.name)
        try:
            child.start()
            wait_ready([child], lambda child: self.board.done(child.name, f"pid {child.pid}"))
            yield child
        finally:
            child.stop()

    def _log(self, name: str) -> Path:
        return self._root / "logs" / f"bench-{name}.log"


def proof(claim: str, taken: Mapping[str, float], prompt_tokens: int) -> str:
    """What contradicts "this prompt came from `claim`" ("" for none); empty when nothing does.

    All that a tier keeps of a prompt must have come from it, and nothing from any other.
    """
    unit = BLOCK if claim == "device" else CHUNK
    least = (prompt_tokens - 1) // unit * unit if claim else 0
    others = {tier: tokens for tier, tokens in taken.items() if tier != claim and tokens}
    if others:
        return f"{others} tokens came from elsewhere than {claim or 'nowhere'}"
    if claim and taken[claim] < least:
        return f"{taken[claim]:g} tokens came from {claim}, not {least}"
    return ""


def totals(exposition: str) -> dict[str, float]:
    """Prometheus text → value of each series, summed over all labels but `tier`: "name" or "name tier"."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            name = " ".join(filter(None, (sample.name, sample.labels.get("tier"))))
            found[name] = found.get(name, 0.0) + sample.value
    return found


def healthy(http: httpx.Client, path: str = "/health") -> bool:
    try:
        return http.get(path, timeout=2.0).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def without_ours(env: Mapping[str, str]) -> dict[str, str]:
    """A stack's own settings must not leak into a measurement."""
    return {name: value for name, value in env.items() if not name.startswith("CAIRN_")}


def cores() -> str:
    """Every usable core but the last, which is left to I/O: the same for plain vLLM and for ours."""
    usable = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, usable[:-1] or usable))


def rest() -> None:
    """Wait until no engine that was just used is still spinning on the core the next one is measured on."""
    time.sleep(_SPIN_SECONDS)


def sentence_on_failure(bench: Callable[[], int]) -> int:
    """The bench's exit code; 2 and one sentence on stderr when it could not measure."""
    try:
        return bench()
    except LaunchError as exc:
        print(exc.tail, f"log: {exc.log}", exc, sep="\n", file=sys.stderr)
    except (BenchFailed, ConfigError, ValueError) as exc:
        print(exc, file=sys.stderr)
    return 2


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
