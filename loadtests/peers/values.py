"""Redis alone: the same 6 MB values through LMCache's connectors and through our tier, turn by turn.

No engine, no prompts: one Valkey on loopback, `VALUES` values a turn, fresh keys every turn.  What each side
does to its values is part of its price: we hash and check every byte, LMCache does not.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import redis

from cacheengine.arena import Arena
from cacheengine.keys import ChunkKey, Namespace, digest
from cacheengine.tier import Ref
from cacheengine.tiers.redis import RedisTier
from loadtests.engine import BenchFailed, without_ours
from loadtests.peers.daemon import QUIET
from loadtests.peers.lines import Line, rotated

LAYERS, HEADS, TOKENS = 30, 192, 256  # SmolLM2-135M: 3 KV heads of 64
VALUE_BYTES = 2 * LAYERS * TOKENS * HEADS * 2
VALUES = 16  # a turn
_SCRIPT = Path(__file__).with_name("lmcache_values.py")
_NAMESPACE = Namespace(digest(b"values"))
THREADS, CONNECTIONS = 8, 2  # what LMCache's daemon and Cairn's engine have when nobody says otherwise
_REDIS, _RESP, _RESP_ALL = "redis://", "resp, 1 connection", f"resp, {THREADS} connections"
_ONE, _ALL, _AS_MANY = "1 connection", f"{CONNECTIONS} connections", f"{THREADS} connections"

Turn = Callable[[str, int], float]  # ("set" or "get", which turn) → GB/s


def lines(python: Path, url: str, turns: int) -> list[Line]:
    """`url` is an empty Valkey.  Raises BenchFailed."""
    speeds: dict[str, dict[str, list[float]]] = {}
    server = redis.Redis.from_url(url)
    with (
        theirs(python, "redis", 1, url) as in_process,
        theirs(python, "resp", 1, url) as resp,
        theirs(python, "resp", THREADS, url) as threads,
        ours(url, 1) as one,
        ours(url, CONNECTIONS) as all_of_it,
        ours(url, THREADS) as as_many,
    ):
        sides = {
            _REDIS: in_process, _RESP: resp, _RESP_ALL: threads, _ONE: one, _ALL: all_of_it, _AS_MANY: as_many
        }  # fmt: skip
        for number in range(turns + 1):
            for name in rotated([*sides], number):
                for verb in ("set", "get"):
                    speed = sides[name](verb, number)
                    if number:  # the first wakes everybody
                        speeds.setdefault(name, {}).setdefault(verb, []).append(speed)
                server.flushall()
    pairs = ((_REDIS, _ONE), (_RESP, _ONE), (_RESP_ALL, _AS_MANY), (_RESP_ALL, _ALL))
    return [
        Line(
            f"Redis {verb}, {his} ÷ our {mine}",
            "GB/s",
            speeds[his][verb],
            speeds[mine][verb],
            note=f"Cairn: {mine}",
        )
        for his, mine in pairs
        for verb in ("set", "get")
    ]


@contextlib.contextmanager
def theirs(python: Path, kind: str, threads: int, url: str) -> Iterator[Turn]:
    """One of LMCache's connectors, in a process of its own that does what it is told.  Raises BenchFailed.

    -P, because the script lies beside a module named like its package.
    """
    at = urlsplit(url)
    command = [str(python), "-P", str(_SCRIPT), kind, "--host", str(at.hostname), "--port", str(at.port)]
    command += ["--threads", str(threads), "--values", str(VALUES)]
    command += ["--layers", str(LAYERS), "--heads", str(HEADS)]
    env = {**without_ours(os.environ), **QUIET, "LMCACHE_RESP_PASSWORD": at.password or ""}
    with subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            if (size := _answer(process, kind)) != VALUE_BYTES:
                raise BenchFailed(f"LMCache's values have {size:.0f} bytes, ours {VALUE_BYTES}")

            def turn(verb: str, number: int) -> float:
                assert process.stdin
                process.stdin.write(f"{verb} {number}\n")
                process.stdin.flush()
                return VALUES * VALUE_BYTES / _answer(process, kind) / 1e9

            yield turn
        finally:
            process.kill()


def _answer(process: subprocess.Popen[str], kind: str) -> float:
    """The next line that is a number; everything else is LMCache's log."""
    assert process.stdout
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            return float(json.loads(line))
    raise BenchFailed(f"LMCache's {kind} client ended")


@contextlib.contextmanager
def ours(url: str, connections: int) -> Iterator[Turn]:
    """Our tier with a thread for each connection, values in an arena as in the engine."""
    arena = Arena(VALUES, VALUE_BYTES)
    for slot in range(VALUES):
        arena.view(slot)[:] = bytes([slot + 1]) * VALUE_BYTES
    tier = RedisTier(
        url, "bench", _NAMESPACE, VALUE_BYTES, TOKENS, "bfloat16", "values", 0, 1, "bench", 600, 5000,
        connections,
    )  # fmt: skip
    views = [arena.view(slot) for slot in range(VALUES)]
    shares = [slice(i * VALUES // connections, (i + 1) * VALUES // connections) for i in range(connections)]

    def turn(verb: str, number: int) -> float:
        refs = [Ref(_key(connections, number, i)) for i in range(VALUES)]
        move = tier.write if verb == "set" else tier.read
        began = time.perf_counter()
        done = sum(pool.map(lambda share: move(refs[share], views[share]), shares))
        seconds = time.perf_counter() - began
        if done != VALUES:
            raise BenchFailed(f"our Redis tier did {done} of {VALUES} values")
        return VALUES * VALUE_BYTES / seconds / 1e9

    try:
        with ThreadPoolExecutor(connections) as pool:
            yield turn
    finally:
        tier.close()


def _key(connections: int, number: int, i: int) -> ChunkKey:
    return ChunkKey(digest(b"%d %d %d" % (connections, number, i)))
