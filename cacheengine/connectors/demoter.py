"""When chunks of the host tier are written to the tiers below it."""

import time
from collections.abc import Callable
from typing import Literal

from cacheengine.plan import HOST, Plan
from cacheengine.store import Store

Write = Literal["behind", "idle", "on_evict", "second_hit"]
Work = Literal["prefill", "decode", "nothing"]  # what a step computes

_BATCH = 8  # chunks in a plan: one pipelined write
# Cold chunks under way in the idle mode, by what the step computes: what others may have to share with.
_QUIET = {"prefill": 0, "decode": 1, "nothing": 8}
DECODE_SECONDS = 1.0  # and beside decoding, between one and the next
_PRESSED = 8  # on_evict: write when less than one in so many host slots is free


class Demoter:
    """Chunks that were used again are written soon; those that were not, when the mode says so:

    behind      at once, beside the compute
    idle        while the engine has nothing to run, one a second beside pure decoding, none beside prefill: a
                workload without reuse pays next to nothing
    on_evict    when host slots run out (used ones too), oldest first
    second_hit  never

    `queue` bounds the chunks under way to one tier.
    """

    def __init__(
        self,
        store: Store,
        write: Write,
        queue: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._write = store, write
        self._queue, self._clock = queue, clock
        self._under_way = dict.fromkeys(store.lower, 0)
        self._next = dict.fromkeys(store.lower, 0.0)  # when a cold chunk may be written beside decoding again

    def plans(self, work: Work) -> list[Plan]:
        """What to write beside a step of such work."""
        if self._write == "on_evict" and not self._pressed():
            return []
        now, plans = self._clock(), []
        for tier, under_way in self._under_way.items():
            quiet = self._quiet(tier, work, now)
            cold = self._write != "second_hit" and under_way < quiet
            room = min((quiet if cold else self._queue) - under_way, _BATCH)
            if room > 0 and (plan := self._store.begin_demote(tier, room, cold)):
                self._under_way[tier] += len(plan.moves)
                self._next[tier] = now + DECODE_SECONDS
                plans.append(plan)
        return plans

    def _quiet(self, tier: str, work: Work, now: float) -> int:
        """Cold chunks that may be under way to a tier."""
        if self._write != "idle":
            return self._queue
        return 0 if work == "decode" and now < self._next[tier] else _QUIET[work]

    def settled(self, plan: Plan) -> None:
        self._under_way[plan.moves[0].tier] -= len(plan.moves)

    @property
    def pending(self) -> bool:
        """There is something to write in the next idle step."""
        if self._write == "on_evict" and not self._pressed():
            return False
        return any(self._store.backlog(tier, self._write != "second_hit") for tier in self._under_way)

    def _pressed(self) -> bool:
        used, slots = self._store.fill()[HOST]
        return slots - used < max(1, slots // _PRESSED)
