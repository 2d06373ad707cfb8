"""What this process saw in the last quarter of an hour: counts in steps of five seconds.

Nothing is kept per request, memory is bounded, and there is no timer: the steps move when somebody writes or
reads.  Times to the first byte are counted in buckets 10 % apart, so a quantile is right to 5 %.
"""

import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gateway.exchange import Exchange
from router.policy import TIERS

STEP_SECONDS = 5
STEPS = 180  # fifteen minutes
LATELY = 12  # steps of the headline: a minute
SMOOTH = 6  # steps a quantile of the time series is made of: half a minute
KINDS = 64  # of errors told apart; further ones are "other"

_FINEST = 0.001  # seconds
_RATIO = math.log(1.1)
_BUCKETS = 160  # up to an hour
_NOTHING = (0,) * len(TIERS)


class Times:
    """How often which time to the first byte was seen."""

    __slots__ = ("_counts", "seen")

    def __init__(self) -> None:
        self._counts, self.seen = array("L", bytes(8 * _BUCKETS)), 0

    def add(self, seconds: float) -> None:
        bucket = int(math.log(seconds / _FINEST) / _RATIO) + 1 if seconds > _FINEST else 0
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.seen += 1


def merged_quantiles(times: Iterable[Times]) -> tuple[float, float] | None:
    """p50 and p95 in seconds of all of them together; None when nothing was seen."""
    some = [each for each in times if each.seen]
    if not some:
        return None
    counts = (
        some[0]._counts
        if len(some) == 1
        else [sum(row) for row in zip(*(t._counts for t in some), strict=True)]
    )
    total, below = sum(each.seen for each in some), 0
    wanted, found = [0.5 * total, 0.95 * total], list[float]()
    for bucket, count in enumerate(counts):
        while len(found) < len(wanted) and below + count >= wanted[len(found)]:
            inside = (wanted[len(found)] - below) / count
            found.append(_FINEST * math.exp(_RATIO * (bucket - 1 + inside)))
        below += count
    return found[0], found[1]


class Row(NamedTuple):
    """One step that is over.  Times in seconds; None where nothing was seen."""

    requests: int
    errors: int  # the gateway's or a worker's
    refused: int  # requests that were wrong (4xx)
    prompt_tokens: int  # of answered prompts whose hits are known or expected
    hit_tokens: tuple[int, ...]  # of those, by tier
    hit_p50: float | None
    hit_p95: float | None
    miss_p50: float | None
    miss_p95: float | None
    saved_seconds: float


@dataclass(slots=True)
class _Step:
    requests: int = 0
    answered: int = 0  # with status 200
    confirmed: int = 0  # of those, whose worker said what was cached
    prompt_tokens: int = 0
    hit_tokens: list[int] = field(default_factory=lambda: [0] * len(TIERS))
    saved_seconds: float = 0.0
    hits: Times = field(default_factory=Times)
    misses: Times = field(default_factory=Times)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # by kind, also what was refused

    @property
    def failed(self) -> int:
        return sum(self.errors.values()) - self.refused

    def row(self, before: Iterable["_Step"] = ()) -> Row:
        """`before`: the steps whose times are taken together with this one's."""
        steps = [*before, self]
        hit50, hit95 = merged_quantiles(step.hits for step in steps) or (None, None)
        miss50, miss95 = merged_quantiles(step.misses for step in steps) or (None, None)
        return Row(
            self.requests,
            self.failed,
            self.refused,
            self.prompt_tokens,
            tuple(self.hit_tokens),
            hit50,
            hit95,
            miss50,
            miss95,
            self.saved_seconds,
        )


class Pulse:
    """REQUIRES: used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._born = clock, clock()
        self._step = 0  # number of the open one
        self._open = _Step()
        self._lately: deque[_Step] = deque(maxlen=LATELY)
        self._rows: deque[Row] = deque(maxlen=STEPS)
        self._errors: deque[Counter[str]] = deque(maxlen=STEPS)
        self._last: dict[str, float] = {}  # kind of error → Unix time
        self.saved_seconds = 0.0  # of computing, since the start
        self.requests = 0

    def ended(self, exchange: Exchange) -> None:
        """A request is over, one way or another."""
        step = self._now()
        step.requests += 1
        self.requests += 1
        if kind := _failure(exchange):
            step.refused += 400 <= exchange.status < 500
            self._failed(step, kind)
        placement, prompt = exchange.placement, exchange.prompt
        if exchange.ttft is None or exchange.status != 200 or placement is None or prompt is None:
            return
        step.answered += 1
        step.confirmed += exchange.usage.cached is not None
        cached = min(exchange.cached_tokens, prompt.tokens)
        (step.hits if cached else step.misses).add(exchange.ttft)
        step.prompt_tokens += prompt.tokens
        for tier, tokens in enumerate(by_tier(placement.hit_by_tier, cached)):
            step.hit_tokens[tier] += tokens
        if cached:
            step.saved_seconds += exchange.saved_seconds
            self.saved_seconds += exchange.saved_seconds

    def headline(self) -> dict[str, Any]:
        """The last minute in a few numbers, and what there was to save."""
        self._now()
        steps = [*self._lately, self._open]
        up = self._clock() - self._born
        seconds = max(1.0, min(up, STEP_SECONDS * len(self._lately) + up % STEP_SECONDS))
        prompt = sum(step.prompt_tokens for step in steps)
        answered = sum(step.answered for step in steps)
        rows: list[Row | _Step] = [*self._rows, self._open]
        long_prompt = sum(row.prompt_tokens for row in rows)
        return {
            "requests_per_second": sum(step.requests for step in steps) / seconds,
            "errors_per_minute": 60 * sum(step.failed for step in steps) / seconds,
            "refused_per_minute": 60 * sum(step.refused for step in steps) / seconds,
            "ttft_hit": merged_quantiles(step.hits for step in steps),
            "ttft_miss": merged_quantiles(step.misses for step in steps),
            "hit_rate": sum(sum(step.hit_tokens) for step in steps) / prompt if prompt else None,
            "hit_rate_long": sum(sum(row.hit_tokens) for row in rows) / long_prompt if long_prompt else None,
            "confirmed": sum(step.confirmed for step in steps) / answered if answered else None,
            "saved_seconds": self.saved_seconds,
            "saved_seconds_long": sum(row.saved_seconds for row in rows),
            "requests": self.requests,
            "uptime_seconds": up,
        }

    def series(self, since: int) -> dict[str, Any]:
        """The steps that are over from number `since` on, as columns."""
        self._now()
        first = max(since, self._step - len(self._rows))
        rows = list(self._rows)[len(self._rows) - (self._step - first) :] if first < self._step else []
        columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in Row._fields}
        for tier, name in enumerate(TIERS):
            columns[name] = [row.hit_tokens[tier] for row in rows]
        del columns["hit_tokens"]
        return {
            "step_seconds": STEP_SECONDS,
            "steps": STEPS,
            "first": first,
            "next": self._step,
            "columns": columns,
        }

    def errors(self) -> list[dict[str, Any]]:
        """Kinds of errors of the last quarter of an hour, most frequent first."""
        self._now()
        total: Counter[str] = Counter(self._open.errors)
        for errors in self._errors:
            total.update(errors)
        return [{"kind": kind, "count": n, "last_at": self._last[kind]} for kind, n in total.most_common()]

    def _failed(self, step: _Step, kind: str) -> None:
        if kind not in self._last and len(self._last) >= KINDS:
            kind = "other"
        self._last[kind] = time.time()
        step.errors[kind] += 1

    def _now(self) -> _Step:
        """The open step, after those that are over were put away."""
        now = int((self._clock() - self._born) / STEP_SECONDS)
        for _ in range(min(now - self._step, STEPS + 1)):  # none, nearly always
            self._rows.append(self._open.row(list(self._lately)[1 - SMOOTH :]))
            self._errors.append(self._open.errors)
            self._lately.append(self._open)
            self._open = _Step()
        self._step = now
        return self._open


def by_tier(expected: Mapping[str, int], cached: int) -> Sequence[int]:
    """`cached` tokens as the worker counted them, dealt to the tiers they were expected in: from the front,
    and what nobody expected to the device, whose cache changes fastest."""
    if not cached:
        return _NOTHING
    dealt, left = [], cached
    for tier in TIERS:
        dealt.append(min(left, expected.get(tier, 0)))
        left -= dealt[-1]
    dealt[0] += left
    return dealt


def _failure(exchange: Exchange) -> str:
    """What went wrong, in a word or two; "" for what did not, and for clients that left."""
    if exchange.failure or exchange.aborted:
        return exchange.failure
    return f"worker answered {exchange.status}" if exchange.status >= 400 else ""
