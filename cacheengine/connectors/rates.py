"""How fast this worker computes and loads: moving averages of what it measured itself."""

import time
from collections.abc import Callable
from typing import Literal

from cacheengine.plan import HOST

Loading = Literal["quicker", "always"]

_WEIGHT = 0.3  # of a new measurement
_MIN_TOKENS = 64  # a shorter prefill says more of the step than of the rate
FRESH_SECONDS = 60.0  # an older bandwidth is tried again rather than believed


class Rates:
    """Prefill in tokens/s; reads in bytes/s of one rank, by tier (host: the scatter into the blocks).
    `loading="always"`: whatever was measured, loading costs nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, loading: Loading = "quicker") -> None:
        self._always = loading == "always"
        self.prefill = 0.0
        self.read: dict[str, float] = {}
        self._when: dict[str, float] = {}
        self._clock = clock

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= _MIN_TOKENS and seconds > 0:
            self.prefill = _blend(self.prefill, tokens / seconds)

    def observe_read(self, tier: str, size: int, seconds: float) -> None:
        if size and seconds > 0:
            self.read[tier] = _blend(self.read.get(tier, 0.0), size / seconds)
            self._when[tier] = self._clock()

    def load_seconds(self, tier: str, size: int) -> float:
        """To bring `size` bytes from `tier` into the blocks.  What was not measured lately costs nothing: the
        way to learn it is to load."""
        legs = {HOST, tier}
        fresh = [leg for leg in legs if self._clock() - self._when.get(leg, -FRESH_SECONDS) < FRESH_SECONDS]
        return sum(size / self.read[leg] for leg in fresh)

    def gain(self, tier: str, size: int, tokens: int) -> float:
        """Seconds saved by loading rather than computing `tokens` tokens of `size` bytes; below 0: lost."""
        if self._always or not self.prefill:
            return 0.0
        return tokens / self.prefill - self.load_seconds(tier, size)


def _blend(old: float, new: float) -> float:
    return new if not old else old + _WEIGHT * (new - old)
