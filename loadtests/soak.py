"""Random faults under load: every answer compared, every request accounted for.   [--minutes 20]

A whole stack (`cairn up`: Valkey, two workers, gateway, supervisor) in float32 answers prompts that share
documents, popular ones far more often than others (Zipf), while loadtests/chaos.py freezes and kills Valkey,
damages slot files, squeezes memory, floods the tiers and, in the first half, kills workers.  Greedy answers
are compared with those of plain vLLM without a cache, computed once before.

At the end: no failed request, no wrong answer, no page that differed (verify_loads), flat memory.  Two kinds
of requests are counted apart, and shown: those *cut* because the worker that was answering them was killed
(the gateway moves a request to another worker until its first byte), and *ties*: answers that part from the
reference at a token whose two best candidates were less than 0.001 apart, where rounding decides.
"""

import argparse
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console

from gateway.launch import state
from gateway.launch.processes import Child, Guard, Spec, wait_ready
from gateway.launch.valkey import free_port
from loadtests.chaos import Chaos
from loadtests.engine import NO_DEVICE_CACHE, Engine, Lab, sentence_on_failure, totals, without_ours
from loadtests.memory import Memory
from loadtests.report import Bar, finish
from loadtests.texts import slices

ANSWER_TOKENS = 16
TIE = 1e-3  # nats between the two best tokens: below it rounding decides
WORKERS, CLIENTS = 2, 3
KILLS_UNTIL = 0.25  # of the time: a worker then fills its tiers again before memory is watched
SETTLED_MINUTES = 10.0  # a shorter run is still filling its tiers, and its memory is not judged
GROWTH = 0.02
_SAY_SECONDS = 10.0
_DYING_SECONDS = 0.2  # between the moment we note a kill and the end of its last process
# small tiers, so that every one of them evicts; verify_loads compares every page that is loaded
_SETTINGS = {
    "CAIRN_DTYPE": "float32",
    "CAIRN_HOST_BYTES": "256MiB",
    "CAIRN_DISK_BYTES": "512MiB",
    "CAIRN_REDIS_BYTES": "384MiB",
    "CAIRN_REDIS_TIMEOUT_MS": "500",
    "CAIRN_VERIFY_LOADS": "true",
    "VLLM_SERVER_DEV_MODE": "1",  # for forget_device()
    "CAIRN_WORKER_COUNT": str(WORKERS),
    "CAIRN_SERVED_MODEL_NAME": "soak",
    "CAIRN_MAX_MODEL_LEN": "4096",
}


class Reference(NamedTuple):
    """What plain vLLM answers, and by how much each token won against the next best."""

    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Asked:
    """One request and what became of it: ok, tie, wrong, cut or failed."""

    start: float
    end: float
    verdict: str
    detail: str = ""


def judge(got: Sequence[int], reference: Reference) -> str:
    """ok, tie (it parts from the reference where rounding decides) or wrong."""
    for mine, theirs, margin in itertools.zip_longest(got, reference.tokens, reference.margins):
        if mine != theirs:
            return "tie" if margin is not None and margin < TIE and mine is not None else "wrong"
    return "ok"


def excuse(start: float, end: float, kills: Sequence[float]) -> str:
    """`cut` for a request that was under way when a worker was killed; one sent later has no excuse."""
    return "cut" if any(start - _DYING_SECONDS < kill < end for kill in kills) else "failed"


@dataclass
class Tallies:
    """Counts of all clients."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: list[Asked] = field(default_factory=list)

    def add(self, one: Asked) -> None:
        with self.lock:
            self.asked.append(one)

    def counts(self) -> Counter[str]:
        with self.lock:
            return Counter(one.verdict for one in self.asked)

    def judged(self, kills: Sequence[float]) -> Counter[str]:
        """The same, with what a killed worker excuses taken from the failed ones."""
        with self.lock:
            verdicts = [
                excuse(one.start, one.end, kills) if one.verdict == "failed" else one.verdict
                for one in self.asked
            ]
        return Counter(verdicts)


class Prompts:
    """Documents with several endings each; `popular()` draws as readers do."""

    def __init__(self, ids: Sequence[int], documents: int, endings: int, rng: random.Random) -> None:
        self._weights = [(rank + 1) ** -1.1 for rank in range(documents)]
        pieces = slices(ids, documents, 1200)
        questions = slices(ids, documents * endings, 60, start=documents * 1200)
        self.all: list[list[int]] = []
        self._endings = endings
        for n, piece in enumerate(pieces):
            document = piece[: rng.randrange(150, 1200)]
            for question in questions[n * endings : (n + 1) * endings]:
                self.all.append(document + question[: rng.randrange(3, 60)])

    def popular(self, rng: random.Random) -> int:
        """The number of a prompt."""
        (document,) = rng.choices(range(len(self._weights)), self._weights)
        return document * self._endings + rng.randrange(self._endings)


def references(engine: Engine, prompts: Sequence[Sequence[int]], console: Console) -> list[Reference]:
    """One at a time, nothing shared: what the model says by itself."""
    found = []
    for n, prompt in enumerate(prompts):
        body = body_of("bench", prompt, stream=False) | {"logprobs": 2}
        choice = engine.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
        best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        margins = [values[0] - values[1] if len(values) > 1 else 1.0 for values in best]
        found.append(Reference(choice["token_ids"], margins))
        if n % 10 == 9:
            console.print(f"reference answers: {n + 1} of {len(prompts)}")
    return found


def body_of(model: str, prompt: Sequence[int], *, stream: bool) -> dict[str, Any]:
    return {
        "model": model, "prompt": list(prompt), "max_tokens": ANSWER_TOKENS, "temperature": 0, "seed": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": stream,
    }  # fmt: skip


class Client:
    """Asks one thing after another until told to stop; half of it streamed."""

    def __init__(
        self, url: str, prompts: Prompts, truth: Sequence[Reference], tallies: Tallies, seed: int
    ) -> None:
        self._http = httpx.Client(base_url=url, timeout=180, trust_env=False)
        self._prompts, self._truth, self._tallies = prompts, truth, tallies
        self._rng = random.Random(seed)

    def run(self, stop: threading.Event) -> None:
        with self._http:
            while not stop.is_set():
                self._tallies.add(self._ask())
                stop.wait(self._rng.random())

    def _ask(self) -> Asked:
        n = self._prompts.popular(self._rng)
        body = body_of("soak", self._prompts.all[n], stream=self._rng.random() < 0.5)
        start = time.monotonic()
        try:
            got = self._streamed(body) if body["stream"] else self._whole(body)
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as exc:
            return Asked(start, time.monotonic(), "failed", f"{type(exc).__name__}: {exc}"[:300])
        verdict = judge(got, self._truth[n])
        detail = "" if verdict == "ok" else f"prompt {n}: {got} instead of {self._truth[n].tokens}"
        return Asked(start, time.monotonic(), verdict, detail)

    def _whole(self, body: dict[str, Any]) -> list[int]:
        reply = self._http.post("/v1/completions", json=body)
        if reply.status_code != httpx.codes.OK:
            raise ValueError(f"{reply.status_code} {reply.text}")
        return list(reply.json()["choices"][0]["token_ids"])

    def _streamed(self, body: dict[str, Any]) -> list[int]:
        tokens: list[int] = []
        with self._http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                raise ValueError(f"{reply.status_code} {reply.read()!r}")
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"in the stream: {event['error']}")
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or ()
        return tokens


@contextmanager
def stack(home: Path, model: Path, log: Path) -> Iterator[tuple[Child, int]]:
    """`cairn up` as a user runs it; (its process, the gateway's port).  Raises LaunchError."""
    port = next(p for p in iter(free_port, 0) if p + WORKERS < 65_000)
    url = f"http://127.0.0.1:{port}"
    env = without_ours(os.environ) | _SETTINGS
    env |= {"CAIRN_HOME": str(home), "CAIRN_MODEL": str(model), "CAIRN_PORT": str(port)}
    log.unlink(missing_ok=True)
    guard = Guard()
    spec = Spec(
        name="stack",
        argv=(sys.executable, "-m", "gateway.cli", "up"),
        log=log,
        ready=lambda: state.read(home) is not None and workers_at(url) == WORKERS,
        env=env,
        deadline_seconds=900,
        grace_seconds=60,
    )
    child = Child(spec, guard)
    try:
        child.start()
        wait_ready([child], lambda child: None)
        yield child, port
    finally:
        child.stop()
        guard.close()


def workers_at(url: str) -> int:
    """How many workers the gateway would send to now."""
    try:
        return int(httpx.get(f"{url}/health/ready", timeout=2, trust_env=False).json()["workers"])
    except (httpx.HTTPError, ValueError, KeyError):
        return 0


def worker_metrics(port: int) -> Counter[str]:
    """Sums over the workers, since each one's last start."""
    found: Counter[str] = Counter()
    for n in range(WORKERS):
        try:
            text = httpx.get(f"http://127.0.0.1:{port + 1 + n}/metrics", timeout=5, trust_env=False).text
        except httpx.HTTPError:
            continue
        found.update({name: value for name, value in totals(text).items() if name.startswith("cairn_")})
    return found


def forget_device(port: int) -> None:
    """Empty vLLM's own prefix cache where a worker is idle just now: it would hold all these prompts, and our
    tiers would have nothing to do."""
    for n in range(WORKERS):
        with suppress(httpx.HTTPError):
            httpx.post(f"http://127.0.0.1:{port + 1 + n}/reset_prefix_cache", timeout=2, trust_env=False)


@dataclass
class Soak:
    """The time under load, once everything runs."""

    console: Console
    launcher: Child
    port: int
    home: Path
    minutes: float
    seed: int
    prompts: Prompts
    truth: list[Reference]
    tallies: Tallies = field(default_factory=Tallies)
    verify_failures: float = 0.0

    def run(self) -> tuple[Chaos, Memory]:
        stop, url = threading.Event(), f"http://127.0.0.1:{self.port}"
        note = state.read(self.home)
        assert note is not None
        memory = Memory(self.launcher.pid, self.port)
        chaos = Chaos(
            memory.parts, note.redis_url, Path(note.disk), url, self.seed, lambda: workers_at(url) == WORKERS
        )
        clients = [
            threading.Thread(
                target=Client(url, self.prompts, self.truth, self.tallies, self.seed + n).run, args=(stop,)
            )
            for n in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            self._watch(chaos, memory)
        finally:
            chaos.heal()
            stop.set()
            for client in clients:
                client.join()
        self._sample()
        return chaos, memory

    def _watch(self, chaos: Chaos, memory: Memory) -> None:
        began = said = time.monotonic()
        seconds = self.minutes * 60
        while (passed := time.monotonic() - began) < seconds:
            if self.launcher.exit_code() is not None:
                raise self.launcher.failure()
            memory.sample(passed / seconds)
            forget_device(self.port)
            if passed < seconds - 20:  # the end is quiet: whatever was broken is used again
                chaos.tick(kills=passed < KILLS_UNTIL * seconds)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                self._sample()
                self._say(passed, chaos, memory)
            time.sleep(1.0)

    def _sample(self) -> None:
        """Counters die with their worker, so they are looked at often."""
        seen = worker_metrics(self.port)["cairn_engine_verify_failures_total"]
        self.verify_failures = max(self.verify_failures, seen)

    def _say(self, passed: float, chaos: Chaos, memory: Memory) -> None:
        counts = self.tallies.judged(chaos.kills)
        told = ", ".join(f"{counts[name]} {name}" for name in ("ok", "tie", "cut", "wrong", "failed"))
        self.console.print(
            f"{passed:5.0f} s  {told};  {memory.line()};  faults: {sum(chaos.counts.values())},"
            f" last: {chaos.last}", highlight=False, soft_wrap=True,
        )  # fmt: skip


def report(soak: Soak, chaos: Chaos, memory: Memory) -> int:
    counts, used = soak.tallies.judged(chaos.kills), worker_metrics(soak.port)
    for one in soak.tallies.asked:
        if one.verdict in ("wrong", "failed", "tie"):
            verdict = excuse(one.start, one.end, chaos.kills) if one.verdict == "failed" else one.verdict
            soak.console.print(f"{verdict}: {one.detail}", highlight=False, soft_wrap=True)
    growth = memory.growth()
    hits = {tier: used[f"cairn_engine_hit_tokens_total {tier}"] for tier in ("host", "disk", "redis")}
    results = {
        "minutes": soak.minutes,
        **{f"requests {name}": float(counts[name]) for name in ("ok", "tie", "cut", "wrong", "failed")},
        **{f"fault {name}": float(n) for name, n in sorted(chaos.counts.items())},
        **{f"tokens from {tier}": n for tier, n in hits.items()},
        "bad frames disk": used["cairn_engine_bad_frames_total disk"],
        "bad frames redis": used["cairn_engine_bad_frames_total redis"],
        **{f"growth {part}": value for part, value in growth.items()},
        **{f"RSS MiB {part}": value for part, value in memory.latest().items()},
    }
    bars = {
        "failed requests": Bar(counts["failed"], 0, "lower"),
        "wrong answers": Bar(counts["wrong"], 0, "lower"),
        "pages that differed": Bar(soak.verify_failures, 0, "lower"),
        "answers": Bar(counts["ok"], 10 * soak.minutes),
        "tokens from the least used tier": Bar(min(hits.values()), 1),
    }
    if soak.minutes >= SETTLED_MINUTES:
        bars["memory growth, last half"] = Bar(max(growth.values(), default=1.0), GROWTH, "lower")
    return finish("soak", results, bars)


def run(args: argparse.Namespace) -> int:
    console, rng = Console(stderr=True), random.Random(args.seed)
    documents = max(8, min(24, int(args.minutes * 3)))
    with Lab(console, dtype="float32") as lab:
        prompts = Prompts(lab.token_ids(), documents, 2, rng)
        with lab.engine("reference", None, *NO_DEVICE_CACHE) as engine:
            truth = references(engine, prompts.all, console)
        home, log = lab.folder / "home", lab.model.path.parents[1] / "logs" / "soak-stack.log"
        console.print(f"starting the stack (log: {log}) …")
        with stack(home, lab.model.path, log) as (launcher, port):
            soak = Soak(console, launcher, port, home, args.minutes, args.seed, prompts, truth)
            chaos, memory = soak.run()
            return report(soak, chaos, memory)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="under load; from 2 on it says something")
    parser.add_argument(
        "--seed", type=int, default=0, help="of prompts and faults; timing stays the machine's"
    )
    args = parser.parse_args(argv)
    return sentence_on_failure(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
