"""Routing policies: pure functions from what we know to an order of workers.

No I/O, no clock, no state: everything a policy may look at is in `Candidate` and `turn`, so a decision
replays from its log line.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from cacheengine.keys import digest

KAPPA = 0.005  # seconds one running request delays a first token
DEFAULT_RATE = 1000.0  # tokens/s of a fleet nobody has measured; alike for all, so it decides nothing
DEFAULT_BANDWIDTH = {"host": 2e9, "disk": 5e8, "shared": 3e8}  # bytes/s until the worker measured its own
SLOWEST = 1.0  # tokens/s or bytes/s; anything below is a broken clock and counts as not measured
SAME = 1.05  # costs within 5 % are equal
BEHIND, MOST_BEHIND = 4.0, 8.0  # how much the prompts that wait weigh, and the most that they may
TIGHT = (1.25, 2.0)  # load bound, times the mean and requests above it: where the order knows no queues
LOOSE = (2.0, 4.0)  # ... and where queues are in the price, and the bound is for what the price got wrong
SESSION = "session"  # the policy that wants the session's ring order
TIERS = ("device", "host", "disk", "shared")
TERMS = ("queue", "transfer", "compute", "interference")


class Hit(NamedTuple):
    """Leading tokens by the tier they would come from: disjoint stretches, in this order."""

    device: int = 0
    host: int = 0
    disk: int = 0
    shared: int = 0


NO_HIT = Hit()
_UNMEASURED: Mapping[str, float] = MappingProxyType({})


class Candidate(NamedTuple):
    """One worker in front of one prompt."""

    worker: str
    ring: int = 0  # its place in the prompt's ring order
    inflight: int = 0  # requests this gateway has open on it
    running: float = 0  # requests it is decoding
    queued_tokens: float = 0  # tokens it computes before ours
    pending_tokens: float = 0  # of those and of `hit`: ours, being computed for somebody else
    prefill_rate: float = 0  # tokens/s, 0 = not measured
    hit: Hit = NO_HIT
    token_bytes: float = 0
    bandwidth: Mapping[str, float] = _UNMEASURED  # bytes/s by tier, where measured
    held_back: bool = False  # new, and this prompt is not of its share yet


class Choice(NamedTuple):
    """A candidate with the hit that makes it so cheap, and what it would cost: seconds in all, and the terms
    of that."""

    candidate: Candidate
    hit: Hit
    seconds: float
    queue: float
    transfer: float
    compute: float
    interference: float

    @property
    def terms(self) -> dict[str, float]:
        return dict(zip(TERMS, self[3:], strict=True))

    @property
    def terms_ms(self) -> dict[str, float]:
        return {name: round(1000 * seconds, 3) for name, seconds in zip(TERMS, self[3:], strict=True)}


# prompt tokens, candidates, running number of the decision → best first, nobody left out
Policy = Callable[[int, Sequence[Candidate], int], list[Choice]]


def predicted_ttft(prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """Fewest predicted seconds to the first token, and of computing where others wait; among equals the less
    loaded, then ring order."""
    choices = _costs(prompt, candidates)
    dearer = _behind(choices)
    within, over = _bounded(choices, LOOSE)
    return _by_price(within, dearer) + _by_price(over, dearer)


def prefix_ring(prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """Ring order with bounded load: the same prefix meets the same worker, with no index at all."""
    within, over = _bounded(_costs(prompt, candidates), TIGHT)
    return [*sorted(within, key=_ring), *sorted(over, key=_ring)]


def session(prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """The same session meets the same worker, under the same bound: the ring order given is the session's
    (`Router.place`), or the prompt's where the request names none."""
    return prefix_ring(prompt, candidates, turn)


def least_loaded(prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """Fewest open requests, then fewest queued tokens.  Blind to the cache."""
    return sorted(_costs(prompt, candidates), key=_load)


def power_of_two(prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """The less loaded of two, drawn anew for every decision: nearly as even as asking all, and old news does
    not send everybody to one worker.  Blind to the cache."""
    drawn = sorted(_costs(prompt, candidates), key=lambda choice: _draw(choice, turn))
    return sorted(drawn[:2], key=_load) + drawn[2:]


def round_robin(prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """Each in turn, by name.  Blind to everything; the baseline."""
    choices = sorted(_costs(prompt, candidates), key=lambda choice: choice.candidate.worker)
    start = turn % len(choices) if choices else 0
    return choices[start:] + choices[:start]


POLICIES: dict[str, Policy] = {
    "predicted_ttft": predicted_ttft,
    "prefix_ring": prefix_ring,
    SESSION: session,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "round_robin": round_robin,
}
CACHE_BLIND = frozenset({SESSION, "least_loaded", "power_of_two", "round_robin"})


def decide(name: str, prompt: int, candidates: Sequence[Candidate], turn: int) -> list[Choice]:
    """The order of a policy, those held back behind everybody else.  Raises KeyError."""
    order = POLICIES[name](prompt, candidates, turn)
    if any(candidate.held_back for candidate in candidates):
        order.sort(key=lambda choice: choice.candidate.held_back)
    return order


def cost(prompt: int, candidate: Candidate, rate: float) -> Choice:
    """Predicted seconds to the first token, term by term, at `rate` tokens/s of prefill.

    A prefix is loaded from the front and can stop after any tier: the cheapest stop is taken, so a tier
    slower than recomputing (and all behind it) counts as a miss.
    """
    hit, transfer, compute = NO_HIT, 0.0, prompt / rate
    if candidate.hit != NO_HIT:
        hit, transfer, compute = _best_stop(prompt, candidate, rate)
    # what is under way is half done on average; so equal prompts meet instead of computing twice
    queue = max(0.0, candidate.queued_tokens - candidate.pending_tokens / 2) / rate
    interference = KAPPA * max(candidate.running, candidate.inflight)
    seconds = queue + transfer + compute + interference
    return Choice(candidate, hit, seconds, queue, transfer, compute, interference)


def _best_stop(prompt: int, candidate: Candidate, rate: float) -> tuple[Hit, float, float]:
    """What is loaded, and the seconds of loading it and of computing the rest."""
    moved = loaded = best_moved = 0.0
    best, best_stop = prompt / rate, 0
    for stop, tier in enumerate(TIERS, 1):
        if not (tokens := min(candidate.hit[stop - 1], prompt - loaded)):
            continue
        loaded += tokens
        if tier != "device":
            speed = candidate.bandwidth.get(tier, 0)
            moved += tokens * candidate.token_bytes / (speed if speed >= SLOWEST else DEFAULT_BANDWIDTH[tier])
        seconds = moved + (prompt - loaded) / rate
        if seconds <= best:
            best, best_stop, best_moved = seconds, stop, moved
    return Hit(*candidate.hit[:best_stop]), best_moved, best - best_moved


def replay(decision: Mapping[str, Any]) -> list[str]:
    """The order of workers again, from one line of the decision log (also after a trip through JSON)."""
    return [choice.candidate.worker for choice in replayed(decision)]


def replayed(decision: Mapping[str, Any]) -> list[Choice]:
    """The same with what each worker would have cost."""
    candidates = [Candidate(**{**held, "hit": Hit(*held["hit"])}) for held in decision["candidates"]]
    return decide(decision["ran"], decision["prompt_tokens"], candidates, decision["turn"])


def as_log(candidate: Candidate) -> dict[str, Any]:
    """What replay() needs, in plain types."""
    return {**candidate._asdict(), "hit": list(candidate.hit), "bandwidth": dict(candidate.bandwidth)}


def _costs(prompt: int, candidates: Sequence[Candidate]) -> list[Choice]:
    measured = [c.prefill_rate for c in candidates if c.prefill_rate >= SLOWEST]
    usual = sum(measured) / len(measured) if measured else DEFAULT_RATE
    return [cost(prompt, c, c.prefill_rate if c.prefill_rate >= SLOWEST else usual) for c in candidates]


def _bounded(choices: list[Choice], bound: tuple[float, float]) -> tuple[list[Choice], list[Choice]]:
    """Bounded load: who has more open requests than the bound goes behind everybody else, however much it
    holds."""
    if not choices:
        return [], []
    times, more = bound
    inflight = [c.candidate.inflight for c in choices]
    cap = times * sum(inflight) / len(choices) + more
    if max(inflight) <= cap:
        return choices, []
    within = [c for c in choices if c.candidate.inflight <= cap]
    return within, [c for c in choices if c.candidate.inflight > cap]


def _behind(choices: Sequence[Choice]) -> float:
    """What a second of computing costs those who wait behind it, in seconds: computing a prefix anew because
    its holder is busy helps one prompt and delays every later one.  Grows with how many prompts like this one
    wait on most workers; nothing where half the fleet is idle."""
    longest = max([choice.compute for choice in choices], default=0.0)
    if longest <= 0:
        return 0.0
    queues = sorted([choice.queue for choice in choices])
    return min(MOST_BEHIND, BEHIND * queues[(len(queues) - 1) // 2] / longest)


def _by_price(choices: Sequence[Choice], dearer: float) -> list[Choice]:
    if not choices:
        return []
    priced = [(choice.seconds + dearer * choice.compute, choice.candidate.ring, choice) for choice in choices]
    limit = SAME * min([price for price, _, _ in priced])
    equal = [choice for price, _, choice in priced if price <= limit]
    rest = sorted([each for each in priced if each[0] > limit], key=itemgetter(0, 1))
    return sorted(equal, key=_load) + [choice for _, _, choice in rest]


_load = attrgetter("candidate.inflight", "candidate.queued_tokens", "candidate.ring")
_ring = attrgetter("candidate.ring")


def _draw(choice: Choice, turn: int) -> bytes:
    return digest(f"{turn} {choice.candidate.worker}".encode())
