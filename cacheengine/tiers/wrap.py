"""Concerns that are the same for every tier, as wrappers around one."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cacheengine.errors import TierDown
from cacheengine.tier import NullTier, Ref, Tier

T = TypeVar("T")


class Breaker:
    """Stops asking a tier that is down, so that a dead Redis costs one deadline and not one for each prompt.

    Closed: calls go through, TierDown too.  After `failures` TierDowns in a row it is open: verbs answer at
    once as a NullTier would.  After `reset_seconds` one call is let through; it closes the breaker, or keeps
    it open for as long again.  Other exceptions pass and count for nothing: they are bugs, not weather.
    """

    def __init__(
        self,
        inner: Tier,
        failures: int = 3,
        reset_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self._limit = failures
        self._reset_seconds = reset_seconds
        self._clock = clock
        self._null = NullTier()
        self._lock = threading.Lock()  # guards what follows
        self._failed = 0  # TierDowns since the last answer
        self._until: float | None = None  # while open: when to try again
        self._trying = False  # while open: the one call that was let through is under way

    @property
    def open(self) -> bool:
        """Calls are not reaching the tier."""
        return self._until is not None

    def prefix(self, refs: Sequence[Ref]) -> int:
        return self._guard(lambda tier: tier.prefix(refs))

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        return self._guard(lambda tier: tier.read(refs, into))

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        return self._guard(lambda tier: tier.write(refs, data))

    def close(self) -> None:
        self.inner.close()

    def _guard(self, verb: Callable[[Tier], T]) -> T:
        if not self._admits():
            return verb(self._null)
        try:
            answer = verb(self.inner)
        except TierDown:
            self._note(down=True)
            raise
        except BaseException:
            with self._lock:
                self._trying = False
            raise
        self._note(down=False)
        return answer

    def _admits(self) -> bool:
        with self._lock:
            if self._until is None:
                return True
            if self._trying or self._clock() < self._until:
                return False
            self._trying = True
            return True

    def _note(self, down: bool) -> None:
        with self._lock:
            self._trying = False
            self._failed = self._failed + 1 if down else 0
            opened = self._failed >= self._limit
            self._until = self._clock() + self._reset_seconds if opened else None
