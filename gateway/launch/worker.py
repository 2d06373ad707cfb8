"""The command line and environment of one vLLM worker with Cairn's cache inside."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cacheengine.offline import as_vllm_reads_it


@dataclass(frozen=True)
class WorkerSpec:
    """One worker: the model, its port, and the cache settings that differ from worker to worker."""

    model: str
    port: int
    served_name: str
    host: str = "127.0.0.1"
    dtype: str = "auto"
    max_model_len: int = 0  # tokens; 0 leaves it to the model
    cores: str = ""  # vLLM's core list for OpenMP threads; empty lets vLLM choose
    redis_url: str = ""
    cache: Mapping[str, str | int] = field(default_factory=dict)  # CacheConfig fields, without redis_url
    extra: tuple[str, ...] = ()  # passed on to vLLM untouched

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def command(spec: WorkerSpec, *, connector: bool = True) -> tuple[str, ...]:
    """argv of the worker.  `connector=False` is plain vLLM, for comparisons inside the tests."""
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", spec.model, "--served-model-name", spec.served_name]
    argv += ["--host", spec.host, "--port", str(spec.port), "--dtype", spec.dtype]
    if spec.max_model_len:
        argv += ["--max-model-len", str(spec.max_model_len)]
    # the gateway compares its predicted hits with what usage.prompt_tokens_details reports
    argv += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if connector:
        argv += ["--kv-transfer-config", json.dumps(as_vllm_reads_it(spec.cache))]
    return (*argv, *spec.extra)


def environment(spec: WorkerSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """The inherited environment plus what a worker needs.  Secrets go here, never into argv."""
    env = dict(inherited)
    env["VLLM_NO_USAGE_STATS"] = "1"
    env["DO_NOT_TRACK"] = "1"
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # one core of the machine stays free for I/O and the scheduler; pinned, because vLLM's own guess depends
    # on whether a connector is configured, and another core count is another rounding
    env.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, enough for small models
    # vLLM 0.32 stores its ahead-of-time compiled model on the CPU but cannot load it again, and compiles anew
    env.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if spec.cores:
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", spec.cores)
    if Path(spec.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if spec.redis_url:
        env["CAIRN_REDIS_URL"] = spec.redis_url
    return env


def core_lists(cores: Sequence[int], workers: int) -> list[str]:
    """Which cores each of several workers computes on.

    One worker chooses for itself.  Several would all choose the same first core, so they are dealt equal
    shares, and one core is left over for I/O when there are more cores than workers.
    """
    if workers == 1 or not cores:
        return [""] * workers
    usable = list(cores[:-1]) if len(cores) > workers else list(cores)
    share = max(1, len(usable) // workers)
    dealt = []
    for i in range(workers):
        start = i * share % len(usable)
        dealt.append(",".join(str(core) for core in usable[start : start + share]))
    return dealt
