"""One line of the router's log."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.policy import Candidate, Choice, Hit, as_log


@dataclass(slots=True, eq=False)
class Decision(Mapping[str, Any]):
    """A mapping of the names below to plain types, enough to replay it: router.policy.replay().

    Many are made and few are read, so it holds what the policy worked with, and writes it out where somebody
    looks: dict(decision) is the whole line.
    """

    model: str
    prompt_tokens: int
    chunks: int
    policy: str
    ran: str  # the policy that made the order
    turn: int  # its number
    index: str  # up, down or unused
    blind: str  # why nothing the index may know was used; "" where it was
    lookup: float  # seconds
    given: Sequence[Candidate]
    choices: Sequence[Choice]  # best first
    reason: str  # of the first
    claimed: Hit  # what the index said of the first, believed or not
    shadow: Mapping[str, Any] | None  # what another policy would have done
    prefixes: Mapping[str, int] = field(default_factory=dict)  # Survey.prefixes
    at: float = field(default_factory=time.time)
    actual_hit_tokens: int | None = None  # until the worker says
    answered_by: str | None = None  # until its first byte
    ttft_ms: float | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in NAMES:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    @property
    def lookup_ms(self) -> float:
        return round(1000 * self.lookup, 3)

    @property
    def candidates(self) -> list[dict[str, Any]]:
        return [as_log(candidate) for candidate in self.given]

    @property
    def order(self) -> list[str]:
        return [choice.candidate.worker for choice in self.choices]

    @property
    def worker(self) -> str:
        return self.choices[0].candidate.worker

    @property
    def expected_hit_tokens(self) -> int:
        return sum(self.choices[0].hit)

    @property
    def claimed_by_index(self) -> dict[str, int]:
        return self.claimed._asdict()

    @property
    def terms_ms(self) -> dict[str, float]:
        return self.choices[0].terms_ms

    @property
    def predicted_ms(self) -> float:
        return round(1000 * self.choices[0].seconds, 3)


NAMES = (
    "at", "model", "prompt_tokens", "chunks", "policy", "ran", "turn", "index", "blind", "lookup_ms",
    "candidates", "order", "worker", "reason", "expected_hit_tokens", "claimed_by_index",
    "actual_hit_tokens", "answered_by", "ttft_ms", "prefixes", "terms_ms", "predicted_ms", "shadow",
)  # fmt: skip
