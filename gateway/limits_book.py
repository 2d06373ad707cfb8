"""limits.lua in Python: the same answers from this process's memory, for when Redis is away."""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import msgspec

_MINUTE = 60_000.0  # ms


class Verdict(IntEnum):
    """What is short; TAKEN is nothing."""

    TAKEN = 0
    MONTH = 1
    PLACES = 2
    REQUESTS = 3
    TOKENS = 4
    TOO_LARGE = 5  # for a minute's tokens: waiting does not help


class Question(msgspec.Struct, omit_defaults=False):
    """What limits.lua is asked; its head says what each field is."""

    key: str
    gateway: str
    month: str
    carried: int = 0
    lease: int = 0
    rpm: float = 0
    tpm: float = 0
    concurrency: int = 0
    budget: int = 0
    take: bool = False
    tokens: int = 0
    settled: int = 0
    spent: int = 0
    known: int = 0
    now: float | msgspec.UnsetType = msgspec.UNSET


class Standing(NamedTuple):
    """Where a key stands after a question."""

    verdict: int
    wait_ms: int
    requests_left: int
    requests_reset_ms: int
    tokens_left: int
    tokens_reset_ms: int
    month_tokens: int


@dataclass
class _Tenant:
    requests: dict[str, tuple[float, float]] = field(default_factory=dict)  # key → used, when (ms)
    tokens: dict[str, tuple[float, float]] = field(default_factory=dict)
    carriers: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    month: str = ""
    spent: int = 0


class Book:
    """REQUIRES: used from one thread."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}

    def keep(self, tenants: set[str]) -> None:
        """Forget everybody else."""
        for gone in self._tenants.keys() - tenants:
            del self._tenants[gone]

    def knew(self, tenant: str, month: str, spent: int) -> None:
        """What Redis last said of the month."""
        held = self._tenants.setdefault(tenant, _Tenant())
        held.month, held.spent = month, spent

    def spend(self, tenant: str, month: str, tokens: int) -> None:
        """Of the month; until Redis says more."""
        held = self._tenants.setdefault(tenant, _Tenant())
        if month > held.month:
            held.month, held.spent = month, 0
        held.spent += tokens

    def ask(self, tenant: str, q: Question, now: float) -> Standing:
        """`now` in ms."""
        held = self._tenants.setdefault(tenant, _Tenant())
        requests = _used(held.requests.get(q.key), q.rpm, now)
        tokens = max(0.0, _used(held.tokens.get(q.key), q.tpm, now) + q.settled)
        carriers = {name: row for name, row in held.carriers.get(q.key, {}).items() if row[1] > now}
        others = sum(count for name, (count, _) in carriers.items() if name != q.gateway)
        month, spent = q.month, q.spent + q.known
        if held.month > month:
            month, spent = held.month, q.spent + held.spent
        elif held.month == month:
            spent = q.spent + max(q.known, held.spent)

        verdict, pause, carried = Verdict.TAKEN, 0, q.carried
        if q.take:
            if q.budget and spent + q.tokens > q.budget:
                verdict = Verdict.MONTH
            elif q.concurrency and others + carried > q.concurrency:
                verdict = Verdict.PLACES
            elif q.rpm and requests + 1 > q.rpm:
                verdict, pause = Verdict.REQUESTS, _wait(requests + 1 - q.rpm, q.rpm)
            elif q.tpm and q.tokens > q.tpm:
                verdict = Verdict.TOO_LARGE
            elif q.tpm and tokens + q.tokens > q.tpm:
                verdict, pause = Verdict.TOKENS, _wait(tokens + q.tokens - q.tpm, q.tpm)
            if verdict is Verdict.TAKEN:
                requests, tokens = requests + 1, tokens + q.tokens
            else:
                carried -= 1

        carriers.pop(q.gateway, None)
        if carried > 0:
            carriers[q.gateway] = (carried, now + q.lease)
        held.carriers[q.key] = carriers
        held.month, held.spent = month, spent
        _tell(held.requests, q.key, q.rpm, requests, now)
        _tell(held.tokens, q.key, q.tpm, tokens, now)
        return Standing(
            verdict,
            pause,
            max(0, math.floor(q.rpm - requests)),
            _wait(requests, q.rpm),
            max(0, math.floor(q.tpm - tokens)),
            _wait(tokens, q.tpm),
            spent,
        )


def _used(held: tuple[float, float] | None, limit: float, now: float) -> float:
    if held is None:
        return 0.0
    amount, at = held
    return max(0.0, amount - max(0.0, now - at) * limit / _MINUTE)


def _wait(over: float, limit: float) -> int:
    return math.ceil(over * _MINUTE / limit) if over > 0 and limit else 0


def _tell(row: dict[str, tuple[float, float]], key: str, limit: float, amount: float, now: float) -> None:
    if limit and amount > 0:
        row[key] = (amount, now)
    else:
        row.pop(key, None)
