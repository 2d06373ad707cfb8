"""Where a request goes, and why."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, overload

from router.policy import NO_HIT, Choice, Hit
from router.worker import Worker


class NoWorker(Exception):
    """No worker that serves this model takes traffic now."""


class Placement(NamedTuple):
    """One choice.  `reason` is one of a small fixed set, fit to be a metric's label:

    hit         this worker holds part of the prompt (or will: somebody is prefilling it there now)
    cold        nobody worth going to holds any of it; cheapest, then ring order
    no_keys     the prompt has no chunk names (short, or a model whose names we cannot make)
    index_down  the chunk index did not answer; ring order
    policy      the policy does not look at the cache
    """

    worker: Worker
    expected_hit_tokens: int
    hit_by_tier: Mapping[str, int]  # tokens expected from device, host, disk, shared
    reason: str
    policy: str
    terms_ms: Mapping[str, float]  # queue, transfer, compute, interference
    claimed: Hit = NO_HIT  # what the index said, believed or not
    decision: int = 0  # number of the decision in the router's log


class Placements(Sequence[Placement]):
    """Best first.  Each is made when it is looked at: nearly always only the first is."""

    def __init__(self, order: Sequence[Choice], make: Callable[[Choice], Placement]) -> None:
        self._order, self._make = order, make

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, at: int) -> Placement: ...

    @overload
    def __getitem__(self, at: slice) -> list[Placement]: ...

    def __getitem__(self, at: int | slice) -> Placement | list[Placement]:
        if isinstance(at, slice):
            return [self._make(choice) for choice in self._order[at]]
        return self._make(self._order[at])
