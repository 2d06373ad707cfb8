"""How fast this worker computes and loads, as it measured itself: computing as a moving average, loading as
the best of the last few times.  A thread that had to wait for a core makes a tier look slow, never fast."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from cacheengine.plan import HOST

Loading = Literal["quicker", "always"]

_WEIGHT = 0.3  # of a new measurement of prefill
_FEW = 3  # measurements that a bandwidth is made of
_MIN_TOKENS = 64  # a shorter prefill says more of the step than of the rate
FRESH_SECONDS = 60.0  # what was measured before that is tried again rather than believed


class Rates:
    """Prefill in tokens/s; reads in bytes/s of one rank, by tier (host: the scatter into the blocks).
    `loading="always"`: whatever was measured, loading costs nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, loading: Loading = "quicker") -> None:
        self._always = loading == "always"
        self.prefill = 0.0
        self.read: dict[str, float] = {}
        self._lately: dict[str, deque[tuple[float, float]]] = {}  # when, and bytes/s
        self._clock = clock

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= _MIN_TOKENS and seconds > 0:
            rate = tokens / seconds
            self.prefill = self.prefill + _WEIGHT * (rate - self.prefill) if self.prefill else rate

    def observe_read(self, tier: str, size: int, seconds: float) -> None:
        if size and seconds > 0:
            lately = self._lately.setdefault(tier, deque(maxlen=_FEW))
            lately.append((self._clock(), size / seconds))
            self.read[tier] = max(rate for _, rate in lately)

    def load_seconds(self, tier: str, size: int) -> float:
        """To bring `size` bytes from `tier` into the blocks.  What was not measured a few times lately costs
        nothing: the way to learn it is to load."""
        return sum(size / self.read[leg] for leg in {HOST, tier} if self._known(leg))

    def gain(self, tier: str, size: int, tokens: int) -> float:
        """Seconds saved by loading rather than computing `tokens` tokens of `size` bytes; below 0: lost."""
        if self._always or not self.prefill:
            return 0.0
        return tokens / self.prefill - self.load_seconds(tier, size)

    def _known(self, tier: str) -> bool:
        lately = self._lately.get(tier)
        return lately is not None and len(lately) == _FEW and self._clock() - lately[0][0] < FRESH_SECONDS
