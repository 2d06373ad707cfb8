"""`cairn doctor`: what is wrong, and what to do about it.

Every finding is a pure function of facts; probe.py reads the facts.  A warning costs speed or comfort, a
failure means that something cannot work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

GIB = 1 << 30
WANTED_VLLM = "0.32"
WANTED_POLICY = "recompute"
_DISK_RESERVE = 2 * GIB


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is empty when there is nothing to do."""

    what: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Facts:
    """What probe.py found.  None or empty means: not there, or not to be seen."""

    python: tuple[int, int] = (0, 0)
    versions: Mapping[str, str] = field(default_factory=dict)  # distribution → version
    compiler: str = ""
    native_built: bool = False
    cores: int = 1
    reserved_cores: str = ""  # VLLM_CPU_NUM_OF_RESERVED_CPU
    home: str = ""
    disk_free_bytes: int = 0
    valkey_server: str = ""  # version line of the bundled server
    redis: Mapping[str, Any] | None = None  # INFO of the stack's Redis
    redis_error: str = ""
    policies: Mapping[int, str] = field(default_factory=dict)  # pid of a vLLM worker → kv_load_failure_policy
    gateway_url: str = ""
    workers: Sequence[Mapping[str, Any]] | None = None  # GET /admin/workers


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order a person would look."""
    return [
        check_python(facts.python),
        check_vllm(facts.versions),
        check_compiler(facts.compiler),
        check_native(facts.native_built),
        check_cores(facts.cores, facts.reserved_cores),
        check_disk(facts.home, facts.disk_free_bytes),
        check_valkey(facts.valkey_server),
        *check_redis(facts.redis, facts.redis_error),
        *check_policies(facts.policies),
        *check_workers(facts.gateway_url, facts.workers),
    ]


def check_python(version: tuple[int, int]) -> Finding:
    text = ".".join(map(str, version))
    if version in ((3, 11), (3, 12)):
        return Finding("python", "ok", text)
    return Finding("python", "fail", text, "use Python 3.11 or 3.12, then `make clean install`")


def check_vllm(versions: Mapping[str, str]) -> Finding:
    vllm, torch = versions.get("vllm-cpu") or versions.get("vllm", ""), versions.get("torch", "")
    if not vllm:
        return Finding("vllm", "warn", "not installed", "run `make install` to start workers on this machine")
    detail = f"{vllm}, torch {torch or 'not installed'}"
    if not torch:
        return Finding("vllm", "fail", detail, "run `make install`: vLLM cannot start without torch")
    if not vllm.startswith(f"{WANTED_VLLM}."):
        fix = f"install vLLM {WANTED_VLLM}: its connector interface changes often"
        return Finding("vllm", "fail", detail, fix)
    return Finding("vllm", "ok", detail)


def check_compiler(path: str) -> Finding:
    if path:
        return Finding("c++ compiler", "ok", path)
    return Finding(
        "c++ compiler", "fail", "none found", "install g++: vLLM's CPU backend and Cairn's kernels need it"
    )


def check_native(built: bool) -> Finding:
    if built:
        return Finding("native kernels", "ok", "cacheengine/_kvops.so")
    return Finding("native kernels", "fail", "not built", "run `python -m cacheengine.build`")


def check_cores(cores: int, reserved: str) -> Finding:
    """`reserved` as the environment of vLLM has it; `cairn up` sets 1 when it is not set."""
    if not reserved:
        return Finding("reserved cores", "ok", f"1 of {cores}, set by `cairn up`")
    if not reserved.isdigit():
        fix = "unset VLLM_CPU_NUM_OF_RESERVED_CPU or make it a number"
        return Finding("reserved cores", "fail", f"{reserved!r} is not a number", fix)
    if int(reserved) >= cores:
        fix = (
            f"set VLLM_CPU_NUM_OF_RESERVED_CPU to less than {cores}, or vLLM ignores it and fights over cores"
        )
        return Finding("reserved cores", "warn", f"{reserved} of {cores}", fix)
    if int(reserved) == 0:
        fix = "set VLLM_CPU_NUM_OF_RESERVED_CPU=1: loads and saves need a core of their own"
        return Finding("reserved cores", "warn", f"0 of {cores}", fix)
    return Finding("reserved cores", "ok", f"{reserved} of {cores}")


def check_disk(home: str, free_bytes: int) -> Finding:
    detail = f"{free_bytes / GIB:.1f} GiB free under {home}"
    if free_bytes < _DISK_RESERVE:
        return Finding("disk", "warn", detail, "free some space, set CAIRN_HOME elsewhere, or use --no-disk")
    return Finding("disk", "ok", detail)


def check_valkey(version: str) -> Finding:
    if version:
        return Finding("bundled valkey", "ok", version)
    return Finding(
        "bundled valkey", "warn", "no binary for this platform", "set REDIS_URL to a Redis of your own"
    )


def check_redis(info: Mapping[str, Any] | None, error: str) -> list[Finding]:
    if error:
        fix = "start it, or correct REDIS_URL; until then routing is by hashing only"
        return [Finding("redis", "fail", error, fix)]
    if info is None:
        return [Finding("redis", "ok", "no stack is running and REDIS_URL is not set")]
    kind = "valkey" if info.get("valkey_version") else "redis"
    version = info.get("valkey_version") or info.get("redis_version", "?")
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    policy, evicted = str(info.get("maxmemory_policy", "?")), int(info.get("evicted_keys", 0))
    found = [Finding("redis", "ok", f"{kind} {version}, {used / GIB:.2f} GiB used, {evicted} keys evicted")]
    if not limit:
        fix = (
            "CONFIG SET maxmemory 4gb (or what you can spare): chunks fill it until the machine has none left"
        )
        found.append(Finding("redis memory", "warn", "no limit", fix))
    elif policy == "noeviction":
        fix = "CONFIG SET maxmemory-policy allkeys-lru: a full Redis refuses new chunks otherwise"
        found.append(Finding("redis memory", "warn", f"limit {limit / GIB:.1f} GiB, noeviction", fix))
    elif policy in ("allkeys-lru", "allkeys-lfu", "volatile-lru", "volatile-lfu"):
        found.append(Finding("redis memory", "ok", f"limit {limit / GIB:.1f} GiB, {policy}"))
    else:
        fix = "CONFIG SET maxmemory-policy allkeys-lru"
        found.append(Finding("redis memory", "warn", f"policy {policy}", fix))
    return found


def check_policies(policies: Mapping[int, str]) -> list[Finding]:
    """A worker whose failed load fails the request breaks the promise that the cache never does."""
    found = []
    for pid, policy in sorted(policies.items()):
        name = f"load failures, pid {pid}"
        if policy == WANTED_POLICY:
            found.append(Finding(name, "ok", policy))
        else:
            fix = 'add "kv_load_failure_policy": "recompute" to its --kv-transfer-config'
            found.append(Finding(name, "fail", policy or "fail (vLLM's default)", fix))
    return found


def check_workers(url: str, workers: Sequence[Mapping[str, Any]] | None) -> list[Finding]:
    if workers is None:
        fix = "start one with `make up`, or name it with --url"
        return [Finding("gateway", "warn", f"none answers at {url}", fix)]
    if not workers:
        fix = "see the workers' logs; do they share its Redis?"
        return [Finding("gateway", "fail", f"{url} knows no worker", fix)]
    return [
        Finding("gateway", "ok", f"{url}, {len(workers)} worker(s)"),
        *(check_handshake(worker) for worker in workers),
        *check_namespaces(workers),
    ]


def check_handshake(worker: Mapping[str, Any]) -> Finding:
    """Whether gateway and worker name chunks alike; without that, routing is by hashing only."""
    name = f"handshake, {worker.get('id', '?')}"
    if worker.get("state") != "ready":
        fix = (
            "POST /admin/workers/{id}/resume gives it traffic again"
            if worker.get("state") in ("drained", "draining")
            else "see its log; it takes traffic again once its /health answers"
        )
        return Finding(name, "warn", f"the worker is {worker.get('state', '?')}", fix)
    if not worker.get("namespace"):
        fix = "start it with `cairn worker`, so that it runs Cairn's connector and registers itself"
        return Finding(name, "warn", "the worker has no cache we know of", fix)
    if not worker.get("trusted", True):
        fix = "give gateway and worker the same model files (tokenizer, chat template) and the same Cairn"
        return Finding(name, "fail", "its keys or token ids are not the gateway's", fix)
    return Finding(name, "ok", "keys and token ids agree")


def check_namespaces(workers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Workers of one model share KV only when their namespaces are equal."""
    found = []
    for model in sorted({str(worker.get("model", "")) for worker in workers}):
        spaces = {
            str(w["namespace"]) for w in workers if str(w.get("model", "")) == model and w.get("namespace")
        }
        if len(spaces) > 1:
            fix = "give them equal --dtype, --block-size, chunk_tokens, CPU type and model files"
            found.append(
                Finding(f"layout, {model}", "warn", f"{len(spaces)} kinds that cannot share KV", fix)
            )
        elif spaces:
            found.append(Finding(f"layout, {model}", "ok", "all workers can share KV"))
    return found
