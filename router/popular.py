"""Where prompts part: behind which chunk many different ones followed lately.

A system prompt has thousands of followers, a turn of a conversation a few (answers edited or asked anew).  A
ring keyed behind the former keeps conversations together and spreads what they have in common.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from cacheengine.keys import ChunkKey

MANY = 8  # followers; in an hour of chats 7 chunks of 170,885 had as many without ending a system prompt
SECONDS = 600.0  # how long a follower counts
DEPTH = 64  # chunks from the front that are looked at
CAPACITY = 16_384  # chunks remembered: those seen last


class Forks:
    """REQUIRES: used from one event loop."""

    def __init__(
        self, clock: Callable[[], float], many: int = MANY, seconds: float = SECONDS, capacity: int = CAPACITY
    ) -> None:
        self._clock, self._many, self._seconds, self._capacity = clock, many, seconds, capacity
        # chunk → its latest followers, at most `many`, and when each was seen last; oldest first in both
        self._seen: OrderedDict[ChunkKey, dict[ChunkKey, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def own(self, keys: Sequence[ChunkKey]) -> ChunkKey:
        """The first chunk behind the last popular one: what is this conversation's own.  REQUIRES keys."""
        return keys[self.shared(keys)]

    def shared(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading chunks many prompts have in common; fewer than there are.  REQUIRES keys."""
        for i in range(min(len(keys) - 1, DEPTH), 0, -1):
            followers = self._seen.get(keys[i - 1])
            if followers is not None and len(followers) >= self._many:
                oldest = next(iter(followers.values()))
                if self._clock() - oldest <= self._seconds:
                    return i
        return 0

    def passed(self, keys: Sequence[ChunkKey]) -> None:
        """A prompt was placed."""
        now = self._clock()
        seen = self._seen
        for i in range(min(len(keys) - 1, DEPTH), 0, -1):  # the front ends up youngest
            if (followers := seen.get(keys[i - 1])) is None:
                seen[keys[i - 1]] = {keys[i]: now}
                continue
            seen.move_to_end(keys[i - 1])
            followers.pop(keys[i], None)
            followers[keys[i]] = now
            if len(followers) > self._many:
                del followers[next(iter(followers))]
        while len(seen) > self._capacity:
            seen.popitem(last=False)
