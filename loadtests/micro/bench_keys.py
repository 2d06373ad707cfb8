"""Hashing a prompt into chunk keys.   python -m loadtests.micro.bench_keys [--quick]

The question: what do keys cost in the gateway and in the scheduler, which both hash every prompt once?
The ceilings: SHA-256 of the same bytes in one call; and the conversion of the token list to bytes, which no
hash can do without.
"""

import argparse
import hashlib
import random
import statistics
import sys
import time
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from cacheengine.keys import KeyChain, KeyScheme, Namespace, token_bytes
from loadtests.report import Bar, finish

TOKENS, CHUNK = 32_768, 256
SCHEME = KeyScheme(Namespace(bytes(16)), CHUNK)


def grow(tokens: list[int], step: int) -> None:
    """As an engine sees it: longer and longer versions of one prompt."""
    chain = KeyChain(SCHEME)
    for end in range(step, len(tokens) + 1, step):
        chain.extend(tokens[:end])


def median_ms(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    rounds = 30 if parser.parse_args().quick else 300
    tokens = [random.Random(1).randrange(49_152) for _ in range(TOKENS)]
    raw = token_bytes(tokens)
    found = {
        "sha256, one call": median_ms(lambda: hashlib.sha256(raw).digest(), rounds),
        "tokens to bytes": median_ms(lambda: token_bytes(tokens), rounds),
        "keys": median_ms(lambda: SCHEME.keys(tokens), rounds),
        "keys, 2,048 tokens at a time": median_ms(lambda: grow(tokens, 2048), rounds),
    }
    table = Table(
        title=f"a prompt of {TOKENS:,} tokens, chunks of {CHUNK}", title_justify="left", box=box.SIMPLE_HEAD
    )
    for name in ("what", "ms", "million tokens/s"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, ms in found.items():
        table.add_row(name, f"{ms:.3f}", f"{TOKENS / ms / 1e3:.1f}")
    Console().print(table)
    ceiling = found["sha256, one call"] + found["tokens to bytes"]
    bars = {"keys / ceiling": Bar(found["keys"] / ceiling, 1.6, "lower")}
    return finish("keys", {f"{name} ms": ms for name, ms in found.items()}, bars)


if __name__ == "__main__":
    sys.exit(main())
