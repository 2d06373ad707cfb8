"""When chunks of the host tier are written to the tiers below it."""

from typing import Literal

from cacheengine.plan import HOST, Plan
from cacheengine.store import Store

Write = Literal["behind", "idle", "on_evict"]
Admit = Literal["always", "second_hit"]

_BATCH = 8  # chunks in a plan: one pipelined write
_QUIET_QUEUE = 8  # chunks under way while waiting for idle moments: what a new request may have to wait for
_PRESSED = 8  # on_evict: write when less than one in so many host slots is free


class Demoter:
    """Chunks that were used again are written soon; those that were not, when the mode says so:

    behind    at once, beside the compute
    idle      while the engine has nothing to run, so that a workload without reuse pays nothing
    on_evict  when host slots run out (used ones too), oldest first

    With `second_hit` a chunk nobody used again is never written.  `queue` bounds the chunks under way to one
    tier.
    """

    def __init__(self, store: Store, write: Write, admit: Admit, queue: int) -> None:
        self._store, self._write, self._admit = store, write, admit
        self._queue = min(queue, _QUIET_QUEUE) if write == "idle" else queue
        self._under_way = dict.fromkeys(store.lower, 0)

    def plans(self, idle: bool) -> list[Plan]:
        """What to write in this step; `idle`: nothing is scheduled."""
        if self._write == "on_evict" and not self._pressed():
            return []
        cold = self._admit == "always" and (self._write != "idle" or idle)
        plans = []
        for tier, under_way in self._under_way.items():
            room = min(self._queue - under_way, _BATCH)
            if room > 0 and (plan := self._store.begin_demote(tier, room, cold)):
                self._under_way[tier] += len(plan.moves)
                plans.append(plan)
        return plans

    def settled(self, plan: Plan) -> None:
        self._under_way[plan.moves[0].tier] -= len(plan.moves)

    @property
    def pending(self) -> bool:
        """There is something to write in the next idle step."""
        if self._write == "on_evict" and not self._pressed():
            return False
        return any(self._store.backlog(tier, self._admit == "always") for tier in self._under_way)

    def _pressed(self) -> bool:
        used, slots = self._store.fill()[HOST]
        return slots - used < max(1, slots // _PRESSED)
