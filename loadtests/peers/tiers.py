"""TTFT from each tier, LMCache's and Cairn's, prompt by prompt in turns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loadtests.engine import CHUNK, NO_DEVICE_CACHE, BenchFailed, Engine, rest
from loadtests.peers.daemon import Peer, PeerLab, forget_pages, in_redis, on_disk, remember_pages
from loadtests.peers.lines import SECONDS, Line, rotated

Prompts = Sequence[list[int]]
# LMCache's client waits without end; where other work slows Valkey down, all must be stored here as well
PATIENT: dict[str, str | int] = {"redis_timeout_ms": 10_000}


@dataclass
class Turns:
    """Both sides on the same prompts, one right after the other; who goes first alternates."""

    peer: Peer
    cairn: Engine
    chunk: int  # LMCache's
    plain: Engine | None = None
    _filled: list[list[int]] = field(default_factory=list)

    def fill(self, prompts: Prompts, *tiers: str) -> Line:
        """Nobody has seen these; `tiers` are Cairn's, all waited for before the next is asked."""
        line = Line("cold", SECONDS, [], [], [], note="LMCache and Cairn store as well")
        for i, prompt in enumerate(prompts):
            self._filled.append(prompt)
            for side in rotated(("plain", "lmcache", "cairn"), i):
                rest()
                if side == "plain" and self.plain:
                    line.plain.append(self.plain.proved(prompt, ""))
                if side == "lmcache":
                    line.lmcache.append(self._first(prompt))
                if side == "cairn":
                    line.cairn.append(self.cairn.proved(prompt, ""))
                    self.cairn.settled(chunks(self._filled, CHUNK), *tiers)
        return line

    def warm(self, prompts: Prompts, name: str, tier: str) -> Line:
        """All of it should come from `tier`.  Of Cairn that is proved; of LMCache it is told."""
        theirs, ours, hits = [], [], []
        for i, prompt in enumerate(prompts):
            for side in rotated(("lmcache", "cairn"), i):
                rest()
                if side == "lmcache":
                    ttft, cached = self.peer.asked(prompt)
                    theirs.append(ttft)
                    hits.append(cached)
                else:
                    ours.append(self.cairn.proved(prompt, tier))
        return Line(name, SECONDS, theirs, ours, note=told(hits))

    def _first(self, prompt: list[int]) -> float:
        ttft, cached = self.peer.asked(prompt)
        if cached:
            raise BenchFailed(f"LMCache had {cached} tokens of a prompt nobody had asked")
        self.peer.daemon.settled(chunks(self._filled, self.chunk))
        return ttft


def chunks(prompts: Prompts, chunk: int) -> int:
    """How many whole chunks they have."""
    return sum(len(prompt) // chunk for prompt in prompts)


def told(hits: Sequence[int]) -> str:
    """How many tokens LMCache had of each prompt, in words."""
    if not any(hits):
        return "LMCache: no hit"
    low, high = min(hits), max(hits)
    return f"LMCache hit {low:,} tokens" if low == high else f"LMCache hit {low:,} to {high:,} tokens"


def host(lab: PeerLab, prompts: Prompts, warm_up: list[int]) -> Iterator[Line]:
    """Memory alone on both sides."""
    mine = {key: value for key, value in lab.disk("cairn").items() if not key.startswith("disk")}
    with (
        lab.engine("plain", None, *NO_DEVICE_CACHE) as plain,
        lab.peer("lmcache") as peer,
        lab.engine("cairn", mine, *NO_DEVICE_CACHE) as cairn,
    ):
        turns = Turns(peer, cairn, lab.chunk, plain)
        turns.fill([warm_up], "host")
        turns.warm([warm_up], "", "host")
        yield turns.fill(prompts, "host")
        yield turns.warm([*prompts] * 3, "host memory", "host")


def disk(lab: PeerLab, prompts: Prompts, warm_up: list[int]) -> Iterator[Line]:
    """kill -9 of every process, then the same folders.  The second half is asked with a warm page cache."""
    mine, theirs = lab.disk("cairn"), lab.folder / "lmcache"
    first, second = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    with (
        lab.peer("lmcache", on_disk(theirs)) as peer,
        lab.engine("cairn", mine, *NO_DEVICE_CACHE) as cairn,
    ):
        Turns(peer, cairn, lab.chunk).fill([warm_up, *prompts], "disk")
        peer.kill()
        cairn.kill()
    with (
        lab.peer("lmcache-again", on_disk(theirs)) as peer,
        lab.engine("cairn-again", mine, *NO_DEVICE_CACHE) as cairn,
    ):
        turns = Turns(peer, cairn, lab.chunk)
        turns.warm([warm_up], "", "disk")
        forget_pages(theirs)
        yield turns.warm(first, "disk after kill -9", "disk")
        remember_pages(theirs)
        yield turns.warm(second, "disk after kill -9, page cache warm", "disk")


def redis(lab: PeerLab, prompts: Prompts, warm_up: list[int]) -> Iterator[Line]:
    """One worker fills a Valkey, another with nothing of its own asks it.  A Valkey for each side."""
    mine = {key: value for key, value in lab.disk("cairn").items() if not key.startswith("disk")}
    with lab.valkey() as theirs, lab.valkey() as ours:
        adapter, secret = in_redis(theirs)
        with (
            lab.peer("lmcache", adapter, secret=secret) as peer,
            lab.engine("cairn", mine | PATIENT, *NO_DEVICE_CACHE, redis_url=ours) as cairn,
        ):
            Turns(peer, cairn, lab.chunk).fill([warm_up, *prompts], "redis")
        with (
            lab.peer("lmcache-other", adapter, secret=secret) as peer,
            lab.engine(
                "cairn-other", {**mine, "worker_id": "other"}, *NO_DEVICE_CACHE, redis_url=ours
            ) as cairn,
        ):
            turns = Turns(peer, cairn, lab.chunk)
            turns.warm([warm_up], "", "redis")
            yield turns.warm(prompts, "Redis, another worker", "redis")
