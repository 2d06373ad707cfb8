"""How far an old heartbeat is believed about what other gateways sent.

What this gateway sent it knows to the request; what others sent it hears four times a second.  Taken at its
word until the next beat, the worker that looked idle is everybody's next choice.  So what is heard fades
into the fleet's mean: in total it stays true, since work that is done is followed by work that arrives, but
who has it is soon unknown.
"""

import math
from collections.abc import Callable, Mapping

FADE_SECONDS = 0.5
LATE_SECONDS = 0.125  # how old a beat is, on average, when the registry reads it
MAX_HEARD = 4096
_NEVER = (None, 0.0)


class Hearsay:
    """REQUIRES: used from one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, float]] = {}  # worker → its latest beat, and when we saw it first

    def faded(
        self, others: Mapping[str, float], beats: Mapping[str, float], note: bool = True
    ) -> dict[str, float]:
        """Tokens others have queued on each worker, as of now.  `others` is what the latest beat said,
        `beats` tells beats apart.  Without `note` this is a look: a new beat stays unseen."""
        now = self._clock()
        if note and len(self._heard) > MAX_HEARD:
            self._heard.clear()  # workers come and go; a beat heard anew only counts as younger
        since = {}
        for worker, latest in beats.items():
            beat, since[worker] = self._heard.get(worker, _NEVER)
            if beat != latest:
                since[worker] = now
                if note:
                    self._heard[worker] = latest, now
        if not any(others.values()):
            return dict.fromkeys(others, 0.0)
        mean = sum(others.values()) / len(others)
        return {
            worker: mean + (tokens - mean) * math.exp(-(now - since[worker] + LATE_SECONDS) / FADE_SECONDS)
            for worker, tokens in others.items()
        }
