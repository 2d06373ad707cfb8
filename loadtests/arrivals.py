"""Requests over virtual time: from a trace, or made up, at the pace that loads a fleet so far."""

import heapq
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cacheengine.keys import ChunkKey, digest
from loadtests import fleet_sim
from loadtests.fleet_sim import CHUNK_TOKENS, Clock, Request

THINK_SECONDS = 1.0


def load(path: Path) -> list[Request]:
    """A trace (jsonl as in loadtests/data/README.md) in order of arrival.  Requests of one timestamp are
    spread evenly up to the next: traces are cut to whole seconds, users are not.  A session is what has the
    first two chunks in common.  Raises ValueError."""
    requests: list[Request] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            prompt = [ChunkKey(digest(str(int(block)).encode())) for block in row["hash_ids"]]
            tokens = int(row["input_length"]), int(row["output_length"])
            requests.append(Request(row["timestamp"] / 1000, prompt, *tokens, session=b"".join(prompt[:2])))
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
            requests.append(
                Request(
                    at + turn * users / 20, [*system, *own], tokens, chance.randint(50, 500), b"%d" % user
                )
            )
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


class Arrivals:
    """Requests in order of arrival; one that continues another's prompt waits until that one was answered,
    and `THINK_SECONDS` more: a trace squeezed in time must not ask about answers nobody had yet."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._due = [(request.at, i) for i, request in enumerate(requests)]
        self._continues: dict[int, int] = {}
        self._waiting: dict[int, list[int]] = {}  # for the answer to that one
        self._answered: set[int] = set()
        self._latest = -1
        ends: dict[tuple[bytes, ChunkKey], int] = {}  # session, last full chunk → its latest prompt

        def named(request: Request) -> Iterator[tuple[bytes, ChunkKey]]:
            return ((request.session, key) for key in reversed(request.prompt))

        for i, request in enumerate(requests):
            earlier = next((ends[name] for name in named(request) if name in ends), None)
            if earlier is not None:
                self._continues[i] = earlier
            if len(request.prompt) > 2:
                ends[request.session, request.prompt[-2]] = i
        heapq.heapify(self._due)

    def next(self, clock: Clock) -> Request | None:
        """Advance the clock to the next arrival; None: everybody has come."""
        while self._due or self._waiting:
            if not self._due or self._due[0][0] > clock.next_due():
                clock.step()
                continue
            at, i = heapq.heappop(self._due)
            earlier = self._continues.get(i, -1)
            if earlier >= 0 and earlier not in self._answered:
                self._waiting.setdefault(earlier, []).append(i)
                continue
            clock.advance(at)
            self._latest, request = i, self._requests[i]
            request.at = at
            return request
        return None

    def watch(self, request: Request, clock: Clock) -> None:
        """The request last returned is on its way: who waits for its answer hears when it is done."""
        number, told = self._latest, request.on_done

        def done(request: Request) -> None:
            told(request)
            self._answered.add(number)
            for i in self._waiting.pop(number, ()):
                heapq.heappush(self._due, (max(clock.now + THINK_SECONDS, self._requests[i].at), i))

        request.on_done = done
