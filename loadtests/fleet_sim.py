"""A fleet of workers in virtual time: what they hold, how long they compute, what they tell the index.

No threads and no sleeping: `Clock` runs callbacks in order of their moment.  The model, with its parts a
worker has in common with a real one:

* A prompt waits its turn, first come first served, and starts when a decode slot is free.  It then looks up
  its longest prefix in the worker's own tiers, then in the shared one; what is not on the device is loaded at
  the tier's bandwidth, one load per tier at a time, while other prompts are computed.
* The rest of the prompt is computed in pieces, one prompt at a time; every sequence being decoded makes a
  piece `INTERFERENCE` longer.  The end of the last piece is the first
  token.  Then it decodes at a steady pace.
* A worker's tiers are one LRU cut in three by recency: what no longer fits the device lies on the host, then
  on disk, then nowhere.  The shared tier is one LRU of the fleet, written with every prompt computed.
  Uses count from the end of a prompt, so what is held is prefix-closed.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cacheengine.index_schema import DEVICE, DISK, HOST, SHARED, Entry
from cacheengine.keys import ChunkKey

CHUNK_TOKENS = 512
TOKEN_BYTES = 131_072  # an 8B model with 8 KV heads of 128 in 32 layers, bf16
PREFILL_RATE = 10_000.0  # tokens/s
PIECE_TOKENS = 2048
DECODE_SECONDS = 0.02  # a token
DECODE_SLOTS = 64
INTERFERENCE = 0.01  # of a piece's time, for each sequence being decoded
BANDWIDTH = {"host": 20e9, "disk": 5e9, "shared": 2.5e9}  # bytes/s
BEAT_SECONDS = 0.25  # of a busy worker
INDEX_SECONDS = 0.02  # from a change to Redis
_BITS = (DEVICE, HOST, DISK)
_LOADED = ("host", "disk", "shared")

Prompt = Sequence[ChunkKey]


class Clock:
    """Virtual seconds.  REQUIRES: nothing is scheduled in the past."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now

    def at(self, moment: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (moment, next(self._order), call))

    def next_due(self) -> float:
        """When the next callback runs; infinity: none is left."""
        return self._due[0][0] if self._due else math.inf

    def step(self) -> None:
        """Run the next callback."""
        self.now, _, call = heapq.heappop(self._due)
        call()

    def advance(self, moment: float) -> None:
        """Run everything due until then."""
        while self._due and self._due[0][0] <= moment:
            self.step()
        self.now = moment


class Capacity(NamedTuple):
    """Chunks; the first three of each worker, the last of the fleet."""

    device: int
    host: int
    disk: int
    shared: int

    @classmethod
    def of(cls, fleet: float, workers: int) -> "Capacity":
        """`fleet` chunks in all: 5 % device, 20 % host, 50 % disk, divided among the workers; 25 % shared."""
        local = (max(1, round(fleet * share / workers)) for share in (0.05, 0.20, 0.50))
        return cls(*local, max(1, round(fleet * 0.25)))

    def total(self, workers: int) -> int:
        return workers * (self.device + self.host + self.disk) + self.shared


class LocalTiers:
    """One LRU in three stretches."""

    def __init__(self, capacity: Capacity) -> None:
        self._slots = capacity[:3]
        self._shelves: tuple[OrderedDict[ChunkKey, None], ...] = (OrderedDict(), OrderedDict(), OrderedDict())
        self._where: dict[ChunkKey, int] = {}

    def bit(self, key: ChunkKey) -> int:
        return _BITS[self._where[key]] if key in self._where else 0

    def depth(self, prompt: Prompt) -> int:
        """Leading chunks held; by bisection, since what is held is prefix-closed."""
        lo, hi = 0, len(prompt)
        while lo < hi:
            mid = (lo + hi + 1) // 2
            lo, hi = (mid, hi) if prompt[mid - 1] in self._where else (lo, mid - 1)
        return lo

    def by_tier(self, held: Prompt) -> list[int]:
        """How many of these held chunks lie where."""
        counts = [0, 0, 0]
        for key in held:
            counts[self._where[key]] += 1
        return counts

    def use(self, prompt: Prompt) -> set[ChunkKey]:
        """The whole prompt was computed or used now.  Returns the chunks that changed their tier."""
        moved = set()
        for key in reversed(prompt):
            at = self._where.get(key)
            if at == 0:
                self._shelves[0].move_to_end(key)
                continue
            if at is not None:
                del self._shelves[at][key]
            self._shelves[0][key], self._where[key] = None, 0
            moved.add(key)
        for i, shelf in enumerate(self._shelves):
            while len(shelf) > self._slots[i]:
                key, _ = shelf.popitem(last=False)
                moved.add(key)
                if i == 2:
                    del self._where[key]
                else:
                    self._shelves[i + 1][key], self._where[key] = None, i + 1
        return moved


class SharedTier:
    """One LRU for all, and who told the index of what."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._known: OrderedDict[ChunkKey, set[int]] = OrderedDict()

    def depth(self, prompt: Prompt, start: int) -> int:
        """Leading chunks that are here or before `start`."""
        while start < len(prompt) and prompt[start] in self._known:
            start += 1
        return start

    def told_by(self, key: ChunkKey, worker: int) -> bool:
        return worker in self._known.get(key, ())

    def use(self, prompt: Prompt, worker: int) -> tuple[set[ChunkKey], list[tuple[ChunkKey, set[int]]]]:
        """Returns what `worker` tells for the first time, and what left, with those who had told of it."""
        news = set()
        for key in reversed(prompt):
            tellers = self._known.setdefault(key, set())
            self._known.move_to_end(key)
            if worker not in tellers:
                tellers.add(worker)
                news.add(key)
        left = [self._known.popitem(last=False) for _ in range(len(self._known) - self._slots)]
        return news, left


@dataclass(slots=True)
class Request:
    """One line of the trace on its way.  Seconds, tokens."""

    at: float
    prompt: Prompt
    tokens: int
    output: int
    session: bytes = b""  # the client's name for the conversation
    on_first: Callable[["Request"], None] = lambda request: None
    on_done: Callable[["Request"], None] = lambda request: None
    hit: int = 0  # tokens found, in any tier
    left: int = 0  # tokens to compute
    ttft: float = 0.0


class Index(Protocol):
    """Hears what a worker holds from now on."""

    def publish(self, worker: int, entries: Sequence[Entry]) -> None: ...


@dataclass(slots=True, eq=False)
class SimWorker:
    """One worker.  `peers` are all of them, itself included, by number."""

    number: int
    clock: Clock
    tiers: LocalTiers
    shared: SharedTier
    index: Index
    peers: Sequence["SimWorker"]
    roots: dict[ChunkKey, ChunkKey]  # of every chunk that was ever computed: the first of its prompt
    waiting: deque[Request] = field(default_factory=deque)
    loading: int = 0
    loaded: deque[Request] = field(default_factory=deque)
    computing: Request | None = None
    running: int = 0
    loader_free: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_LOADED, 0.0))
    busy: float = 0.0  # seconds spent computing
    queued: int = 0  # tokens not computed; of a prompt that waits, without what the tiers held when it came

    def arrive(self, request: Request) -> None:
        local = min(self.tiers.depth(request.prompt) * CHUNK_TOKENS, request.tokens)
        request.left = request.tokens - local
        self.queued += request.left
        self.waiting.append(request)
        self._pump()

    def beat(self) -> Mapping[str, float]:
        return {
            "running": self.running,
            "waiting": len(self.waiting),
            "queued_tokens": self.queued,
            "prefill_rate": PREFILL_RATE,
            "bw_host": BANDWIDTH["host"],
            "bw_disk": BANDWIDTH["disk"],
            "bw_redis": BANDWIDTH["shared"],
        }

    def bits(self, key: ChunkKey) -> int:
        return self.tiers.bit(key) | (SHARED if self.shared.told_by(key, self.number) else 0)

    def _pump(self) -> None:
        while self.computing is None:
            if self.loaded:
                self.computing = self.loaded.popleft()
                self._compute()
            elif self.waiting and self.running + self.loading < DECODE_SLOTS:
                self._begin(self.waiting.popleft())
            else:
                return

    def _begin(self, request: Request) -> None:
        local = self.tiers.depth(request.prompt)
        depth = self.shared.depth(request.prompt, local)
        request.hit = min(depth * CHUNK_TOKENS, request.tokens)
        self.queued -= request.left
        request.left = max(1, request.tokens - request.hit)
        self.queued += request.left
        _, host, disk = self.tiers.by_tier(request.prompt[:local])
        ready = now = self.clock.now
        for tier, chunks in zip(_LOADED, (host, disk, depth - local), strict=True):
            if chunks:
                start = max(now, self.loader_free[tier])
                end = start + chunks * CHUNK_TOKENS * TOKEN_BYTES / BANDWIDTH[tier]
                self.loader_free[tier], ready = end, max(ready, end)
        if ready > now:
            self.loading += 1
            self.clock.at(ready, lambda: self._arrived(request))
        else:
            self.computing = request
            self._compute()

    def _arrived(self, request: Request) -> None:
        self.loading -= 1
        self.loaded.append(request)
        self._pump()

    def _compute(self) -> None:
        request = self.computing
        assert request is not None
        piece = min(PIECE_TOKENS, request.left)
        seconds = piece / PREFILL_RATE * (1 + INTERFERENCE * self.running)
        self.busy += seconds
        self.clock.at(self.clock.now + seconds, lambda: self._computed(request, piece))

    def _computed(self, request: Request, piece: int) -> None:
        request.left -= piece
        self.queued -= piece
        if request.left > 0:
            self._compute()
            return
        self.computing = None
        self.running += 1
        request.ttft = self.clock.now - request.at
        request.on_first(request)
        self._store(request.prompt)
        self.clock.at(self.clock.now + request.output * DECODE_SECONDS, lambda: self._finish(request))
        self._pump()

    def _finish(self, request: Request) -> None:
        self.running -= 1
        request.on_done(request)
        self._pump()

    def _store(self, prompt: Prompt) -> None:
        for key in prompt:
            self.roots[key] = prompt[0]
        changed = self.tiers.use(prompt)
        news, left = self.shared.use(prompt, self.number)
        self._tell(changed | news)
        lost: dict[int, list[ChunkKey]] = {}
        for key, tellers in left:
            for number in tellers:
                lost.setdefault(number, []).append(key)
        for number, keys in lost.items():
            self.peers[number]._tell(keys)

    def _tell(self, keys: set[ChunkKey] | list[ChunkKey]) -> None:
        if keys:
            self.index.publish(self.number, [Entry(self.roots[key], key, self.bits(key)) for key in keys])


def fleet(clock: Clock, workers: int, capacity: Capacity, index: Index) -> list[SimWorker]:
    """Workers with one shared tier."""
    shared, peers = SharedTier(capacity.shared), list[SimWorker]()
    roots: dict[ChunkKey, ChunkKey] = {}
    for number in range(workers):
        peers.append(SimWorker(number, clock, LocalTiers(capacity), shared, index, peers, roots))
    return peers


def oracle(requests: Sequence[Request], slots: int | None) -> int:
    """Hit tokens of one pooled LRU that learns of a prompt the moment it arrives; None: without bound."""
    held: OrderedDict[ChunkKey, None] = OrderedDict()
    hits = 0
    for request in requests:
        depth = sum(1 for _ in itertools.takewhile(held.__contains__, request.prompt))
        hits += min(depth * CHUNK_TOKENS, request.tokens)
        for key in reversed(request.prompt):
            held[key] = None
            held.move_to_end(key)
        while slots is not None and len(held) > slots:
            held.popitem(last=False)
    return hits
