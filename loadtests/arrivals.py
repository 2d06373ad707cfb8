"""Requests over virtual time: from a trace, or made up, at the pace that loads a fleet so far."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cacheengine.keys import ChunkKey, digest
from loadtests import fleet_sim
from loadtests.fleet_sim import CHUNK_TOKENS, Request


def load(path: Path) -> list[Request]:
    """A trace (jsonl as in loadtests/data/README.md) in order of arrival.  Requests of one timestamp are
    spread evenly up to the next: traces are cut to whole seconds, users are not.  Raises ValueError."""
    requests: list[Request] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            prompt = [ChunkKey(digest(str(int(block)).encode())) for block in row["hash_ids"]]
            requests.append(
                Request(row["timestamp"] / 1000, prompt, int(row["input_length"]), int(row["output_length"]))
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path.name}, line {number}: no request: {error!r}") from error
    requests.sort(key=lambda request: request.at)
    groups = [list(group) for _, group in itertools.groupby(requests, key=lambda request: request.at)]
    for group, following in itertools.pairwise([*groups, groups[-1]]):
        for i, request in enumerate(group):
            request.at += i / len(group) * (following[0].at - group[0].at)
    return requests


def one_system_prompt(users: int, turns: int = 3, seed: int = 0) -> list[Request]:
    """Everybody starts with the same 4,096 tokens, says something of their own, and comes back twice."""
    chance = random.Random(seed)
    system = [ChunkKey(digest(f"system {i}".encode())) for i in range(8)]
    requests = []
    for user in range(users):
        at, own = chance.random() * users, list[ChunkKey]()
        for turn in range(turns):
            said = range(len(own), len(own) + chance.randint(1, 4))
            own = [*own, *(ChunkKey(digest(f"user {user} {i}".encode())) for i in said)]
            tokens = CHUNK_TOKENS * len(system + own) - chance.randrange(CHUNK_TOKENS)
            requests.append(Request(at + turn * users / 20, [*system, *own], tokens, chance.randint(50, 500)))
    return sorted(requests, key=lambda request: request.at)


def paced(requests: Sequence[Request], workers: int, load: float, uncached: int) -> list[Request]:
    """Fresh requests at the pace at which computing `uncached` tokens in all, slowed down by decoding, keeps
    the workers busy for `load` of the time, and decoding fills no more than that of the slots."""
    decode = sum(request.output for request in requests) * fleet_sim.DECODE_SECONDS
    compute = uncached / fleet_sim.PREFILL_RATE / workers
    slowed = compute * fleet_sim.INTERFERENCE * decode / workers
    seconds = (compute + math.sqrt(compute**2 + 4 * load * slowed)) / (2 * load)
    seconds = max(seconds, decode / workers / fleet_sim.DECODE_SLOTS / load)
    start, span = requests[0].at, requests[-1].at - requests[0].at
    scale = seconds / span if span else 0.0
    return [replace(request, at=(request.at - start) * scale) for request in requests]
