"""Where a request goes, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from router.policy import NO_HIT, Hit
from router.worker import Worker


class NoWorker(Exception):
    """No worker that serves this model takes traffic now."""


@dataclass(frozen=True, slots=True)
class Placement:
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
