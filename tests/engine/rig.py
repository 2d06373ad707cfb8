"""A real vLLM worker on the CPU, started as `cairn worker` starts it, held by its pid."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx

from gateway.launch.worker import WorkerSpec, command, environment

START_SECONDS = 600  # a busy machine compiles for minutes; a worker that died is noticed at once
ANSWER_SECONDS = 900  # a machine may stand still for minutes; one that hangs tells where


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Worker:
    """One server process.  `cache=None` is plain vLLM; `args` go to vLLM, `env` to its environment.

    Starts without waiting, so that two can start at once; ready() waits.  `core` pins its compute
    ("0|1": one core for each of two ranks): equal thread counts are equal rounding.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        cache: dict[str, str | int] | None,
        *,
        redis_url: str = "",
        core: int | str = 0,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        port = free_port()
        if cache is not None:
            ours = {"worker_id": f"w{port}", "worker_url": f"http://127.0.0.1:{port}", "loading": "always"}
            cache = ours | cache  # a busy machine must not make a tier look slow
        spec = WorkerSpec(
            model=str(model), port=port, served_name="smol", max_model_len=4096, redis_url=redis_url,
            cache=cache or {}, cores=str(core), extra=("--max-num-seqs", "8", *args),
        )  # fmt: skip
        self.url, self.log = spec.url, log
        variables = environment(
            spec, {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONFAULTHANDLER": "1", **(env or {})}
        )
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command(spec, connector=cache is not None),
                stdout=out, stderr=out, env=variables, start_new_session=True,
            )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS)

    def ready(self) -> Self:
        """Wait until it serves.  Raises AssertionError with the end of its log."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.3)
        raise AssertionError(f"the worker did not come up:\n{self._last_words()}")

    def _last_words(self) -> str:
        """The end of its log, with where each of its threads was."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGABRT)  # faulthandler prints every stack
            time.sleep(3)
        self.kill()
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-150:])

    def tokens(self, text: str) -> list[int]:
        body = {"model": "smol", "prompt": text, "add_special_tokens": False}
        return list(self.http.post("/tokenize", json=body).json()["tokens"])

    def complete(self, prompt: Sequence[int] | str, max_tokens: int = 64, **fields: object) -> list[int]:
        """Greedy token ids; stop tokens are ignored so that every answer has `max_tokens`."""
        return self.complete_all([prompt], max_tokens, **fields)[0]

    def complete_all(
        self, prompts: list[Sequence[int] | str], max_tokens: int, **fields: object
    ) -> list[list[int]]:
        """The same of several prompts in one request, which the engine gets at once."""
        body = {
            "model": "smol", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "seed": 0,
            "ignore_eos": True, "return_token_ids": True, **fields,
        }  # fmt: skip
        try:
            reply = self.http.post("/v1/completions", json=body)
        except httpx.ReadTimeout as exc:
            raise AssertionError(f"no answer in {ANSWER_SECONDS} s:\n{self._last_words()}") from exc
        assert reply.status_code == 200, reply.text
        choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
        return [list(choice["token_ids"]) for choice in choices]

    def ttft(self, prompt: Sequence[int], max_tokens: int = 2) -> float:
        """Seconds to the first streamed token."""
        body = {"model": "smol", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        start = time.perf_counter()
        first = 0.0
        with self.http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - start
                    assert "error" not in json.loads(line[6:]), line
        assert first, "no token came"
        return first

    def chat_tokens(self, **body: object) -> list[int]:
        """Token ids of a chat, as this server renders it."""
        return list(self.http.post("/tokenize", json={"model": "smol", **body}).json()["tokens"])

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the series of `name` that carry these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                given = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if all(given.get(k) == v for k, v in labels.items()):
                    total += float(found[3])
        return total

    def hits(self, tier: str) -> float:
        """Prompt tokens loaded from a tier so far."""
        return self.metric("cairn_engine_hit_tokens_total", tier=tier)

    def settled(self, tier: str, chunks: int, timeout: float = 300) -> None:
        """Wait until `chunks` were written to a lower tier, or dropped and counted, and none is waiting."""
        until = time.monotonic() + timeout
        while (done := self.written(tier)) < chunks or self.metric("cairn_engine_backlog_chunks", tier=tier):
            assert time.monotonic() < until, f"{done} of {chunks} chunks written to {tier}"
            time.sleep(0.1)

    def written(self, tier: str) -> float:
        """Chunks handed to a lower tier so far, kept or not."""
        names = ("cairn_engine_saved_chunks_total", "cairn_engine_dropped_chunks_total")
        return sum(self.metric(name, tier=tier) for name in names)

    def reset_device(self) -> None:
        """Drop vLLM's own prefix cache, not ours."""
        assert self.http.post("/reset_prefix_cache").status_code == 200

    def kill(self) -> None:
        """kill -9, the whole process group."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """As a deployment would: SIGTERM, then patience."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(30)
        self.http.close()
