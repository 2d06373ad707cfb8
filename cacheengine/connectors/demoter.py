"""When chunks of the host tier are written to the tiers below it."""

from typing import Literal

from cacheengine.plan import HOST, Plan
from cacheengine.store import Store

Write = Literal["behind", "idle", "on_evict"]
Admit = Literal["always", "second_hit"]
Work = Literal["prefill", "decode", "nothing"]  # what a step computes

_BATCH = 8  # chunks in a plan: one pipelined write
# Cold chunks under way in the idle mode, by what the step computes: what others may have to share with.
_QUIET = {"prefill": 0, "decode": 2, "nothing": 8}
_PRESSED = 8  # on_evict: write when less than one in so many host slots is free


class Demoter:
    """Chunks that were used again are written soon; those that were not, when the mode says so:

    behind    at once, beside the compute
    idle      while the engine has nothing to run, a few beside pure decoding, none beside prefill: a
              workload without reuse pays next to nothing
    on_evict  when host slots run out (used ones too), oldest first

    With `second_hit` a chunk nobody used again is never written.  `queue` bounds the chunks under way to one
    tier.
    """

    def __init__(self, store: Store, write: Write, admit: Admit, queue: int) -> None:
        self._store, self._write, self._admit = store, write, admit
        self._queue = queue
        self._under_way = dict.fromkeys(store.lower, 0)

    def plans(self, work: Work) -> list[Plan]:
        """What to write beside a step of such work."""
        if self._write == "on_evict" and not self._pressed():
            return []
        quiet = _QUIET[work] if self._write == "idle" else self._queue
        plans = []
        for tier, under_way in self._under_way.items():
            cold = self._admit == "always" and under_way < quiet
            room = min((quiet if cold else self._queue) - under_way, _BATCH)
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
