"""What each side costs when nothing is reused, and what it does when its processes die."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import redis

from loadtests.bench_overhead import MAX_TOKENS, throughput
from loadtests.engine import CHUNK, NO_DEVICE_CACHE, BenchFailed, Engine
from loadtests.peers.daemon import PeerLab, in_redis, on_disk
from loadtests.peers.lines import SECONDS, Line, rotated
from loadtests.peers.tiers import PATIENT, Prompts, chunks

PATIENCE_SECONDS = 60.0  # nobody waits longer for a first token
_REUSED = "vllm:external_prefix_cache_hits_total"  # whatever connector they came through
ASKED = 3  # fresh prompts after each fault, one at a time


def overhead(lab: PeerLab, runs: Sequence[Prompts]) -> Iterator[Line]:
    """Every tier on, on both sides.  The first run wakes the workers and is not counted."""
    line = Line("no reuse, ÷ plain vLLM", "×", [], [])
    tokens = Line("no reuse", "tokens/s", [], [], [], note=f"answers of {MAX_TOKENS} tokens")
    with lab.valkey() as theirs, lab.valkey() as ours:
        adapter, secret = in_redis(theirs)
        with (
            lab.engine("plain", None, *NO_DEVICE_CACHE) as plain,
            lab.peer("lmcache", on_disk(lab.folder / "lmcache"), adapter, secret=secret) as peer,
            lab.engine("cairn", lab.disk("cairn") | PATIENT, *NO_DEVICE_CACHE, redis_url=ours) as cairn,
        ):
            seen: list[list[int]] = []
            for i, prompts in enumerate(runs):
                seen += prompts
                found = {}
                for side in rotated(("plain", "lmcache", "cairn"), i):
                    found[side] = throughput(
                        {"plain": plain, "lmcache": peer.engine, "cairn": cairn}[side], prompts
                    )
                    if side == "lmcache":
                        peer.daemon.settled(chunks(seen, lab.chunk))
                    if side == "cairn":
                        cairn.settled(chunks(seen, CHUNK), "host", "disk", "redis")
                if i:
                    tokens.plain.append(found["plain"])
                    tokens.lmcache.append(found["lmcache"])
                    tokens.cairn.append(found["cairn"])
                    line.lmcache.append(found["lmcache"] / found["plain"])
                    line.cairn.append(found["cairn"] / found["plain"])
            for engine in (plain, peer.engine, cairn):
                if reused := engine.metrics().get(_REUSED):
                    raise BenchFailed(f"{reused:g} tokens were reused: this is not a workload without reuse")
    yield tokens
    yield line


class Waited(NamedTuple):
    """Seconds to the first token, or until nobody waited any longer."""

    seconds: float
    why_not: str = ""


def faults(lab: PeerLab, prompts: Prompts, warm_up: list[int]) -> Iterator[Line]:
    """Both sides' Valkey freezes and thaws; then LMCache loses its daemon, and Cairn its Valkey.

    Cairn has no process like the daemon: its Valkey is the only other one there is to lose.
    """
    frozen, killed = prompts[:ASKED], prompts[ASKED:]
    mine = {key: value for key, value in lab.disk("cairn").items() if not key.startswith("disk")}
    with lab.valkey() as theirs, lab.valkey() as ours:
        adapter, secret = in_redis(theirs)
        servers = [_pid(theirs), _pid(ours)]
        with (
            lab.peer("lmcache", adapter, secret=secret) as peer,
            lab.engine("cairn", mine, *NO_DEVICE_CACHE, redis_url=ours) as cairn,
        ):
            pair = (peer.engine, cairn)
            _wake(pair, warm_up)
            _signal(servers, signal.SIGSTOP)
            try:
                yield fault("Valkey frozen", *(after(engine, frozen) for engine in pair))
            finally:
                _signal(servers, signal.SIGCONT)
            _signal(servers[1:], signal.SIGKILL)
            peer.daemon.kill()
            yield fault("its daemon killed, our Valkey killed", *(after(engine, killed) for engine in pair))


def after(engine: Engine, prompts: Prompts) -> list[Waited]:
    """Asked one after another until one waits in vain; one that is refused at once does not end it."""
    found = []
    for prompt in prompts:
        began = time.monotonic()
        try:
            found.append(Waited(engine.ask(prompt).ttft))
        except BenchFailed as exc:
            found.append(Waited(time.monotonic() - began, str(exc)))
            if found[-1].seconds >= PATIENCE_SECONDS:
                break
    return found


def fault(name: str, theirs: Sequence[Waited], ours: Sequence[Waited]) -> Line:
    """Who was not answered counts as having waited to the end, however soon it was told so."""
    return Line(
        f"TTFT, {name}",
        SECONDS,
        [counted(waited) for waited in theirs],
        [counted(waited) for waited in ours],
        note="; ".join(f"{side}: {said(waits)}" for side, waits in (("LMCache", theirs), ("Cairn", ours))),
        worst=True,
        unanswered=sum(bool(waited.why_not) for waited in ours),
    )


def counted(waited: Waited) -> float:
    return PATIENCE_SECONDS if waited.why_not else waited.seconds


def said(waits: Sequence[Waited]) -> str:
    """Who was answered, and why the first that was not was not."""
    failed = [waited.why_not for waited in waits if waited.why_not]
    text = f"{len(waits) - len(failed)} of {len(waits)} answered"
    return f"{text} ({failed[0][:80]})" if failed else text


def _wake(engines: Sequence[Engine], prompt: list[int]) -> None:
    for engine in engines:
        engine.ask(prompt)
        engine.http.timeout = PATIENCE_SECONDS


def _signal(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        os.kill(process, number)


def _pid(url: str) -> int:
    return int(redis.Redis.from_url(url).info("server")["process_id"])
