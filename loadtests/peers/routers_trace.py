"""A trace of real prompts as requests: lengths and arrivals scaled down, block numbers turned into words.

A block of the trace (512 tokens, named by a number) becomes 512 / `shrink` words, the same for the same
number everywhere; a word is one token (mock_worker.vocabulary), so prompts share what the trace's share.
"""

import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

BLOCK = 512  # tokens of the trace's blocks
TICK_MS = 3000  # of its clock


@dataclass(frozen=True)
class Ask:
    """One request of the scaled trace.  `at` is seconds since the first, still in the trace's own time."""

    at: float
    blocks: tuple[int, ...]
    tokens: int
    answer: int  # tokens
    body: bytes
    session: str  # a name its conversation keeps


def load(path: Path, words: Sequence[str], shrink: int, limit: int | None = None) -> list[Ask]:
    """Raises ValueError or KeyError for what is no trace, or when a block would have no whole words."""
    if BLOCK % shrink:
        raise ValueError(f"{BLOCK} tokens do not divide by {shrink}")
    asks: list[Ask] = []
    said: dict[int, list[str]] = {}
    rows = [json.loads(line) for line in path.read_text().splitlines()[:limit]]
    for row, at in zip(rows, arrivals([row["timestamp"] for row in rows]), strict=True):
        blocks = tuple(row["hash_ids"])
        size = BLOCK // shrink
        tokens = min(max(1, row["input_length"] // shrink), size * len(blocks))
        text: list[str] = []
        for block in blocks:
            if block not in said:
                said[block] = random.Random(block).choices(words, k=size)
            text += said[block]
        answer = max(1, row["output_length"] // shrink)
        asks.append(
            Ask(
                at=at,
                blocks=blocks,
                tokens=tokens,
                answer=answer,
                body=body(text[:tokens], answer),
                # the first block is common to all; the second tells conversations apart
                session=str(blocks[1] if len(blocks) > 1 else blocks[0]),
            )
        )
    return asks


def arrivals(stamps: Sequence[int]) -> list[float]:
    """Seconds since the first, from milliseconds in order.  Not all requests of a tick came at its beginning:
    they are spread until the next tick, the same way every time."""
    rng = random.Random(0)
    ticks = sorted(set(stamps))
    until = dict(pairwise([*ticks, ticks[-1]]))
    spread = sorted(at + rng.random() * min(TICK_MS, until[at] - at) for at in stamps)
    return [(at - spread[0]) / 1000 for at in spread]


def body(words: Sequence[str], answer: int) -> bytes:
    """A streamed completion of text: token ids are no fair question, a peer keys them by their number."""
    ask = {
        "model": "mock", "prompt": "".join(f" {word}" for word in words), "max_tokens": answer,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(ask).encode()


def pooled_hits(asks: Sequence[Ask], chunks: int, chunk_tokens: int, shrink: int) -> float:
    """The share of prompt tokens that one cache of all workers' `chunks` together would have had: what the
    best router could hope for, if load were no object."""
    per = BLOCK // shrink // chunk_tokens
    room = max(1, chunks // per)  # whole blocks
    held: OrderedDict[int, None] = OrderedDict()
    hit = total = 0
    for ask in asks:
        found = 0
        for block in ask.blocks:
            if block not in held:
                break
            found += 1
        hit += min(found * per * chunk_tokens, (ask.tokens - 1) // chunk_tokens * chunk_tokens)
        total += ask.tokens
        for block in reversed(ask.blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > room:
            held.popitem(last=False)
    return hit / total
