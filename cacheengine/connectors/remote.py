"""Asks the shared tier what it holds, without keeping the scheduler's thread waiting."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from cacheengine.errors import CacheError
from cacheengine.keys import KEY_BYTES, ChunkKey
from cacheengine.pool import submit
from cacheengine.tier import Ref, Tier
from cacheengine.tiers.wrap import Breaker

logger = logging.getLogger(__name__)

MAX_PROBES = 64  # look-ups waiting at once; a prompt beyond it does without Redis


class Remote:
    """Asks Redis, on one thread of its own, how much of a prefix it holds for every rank."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = [Breaker(tier) for tier in tiers]
        self._thread = ThreadPoolExecutor(1, "cairn-probe")
        self._room = threading.BoundedSemaphore(MAX_PROBES)

    def ask(self, keys: Sequence[ChunkKey]) -> "Future[int] | None":
        if not self._room.acquire(blocking=False):
            return None
        broken = any(tier.open for tier in self._tiers)
        try:
            asked = submit(self._thread, partial(self._prefix, keys[:1] if broken else keys))
        except RuntimeError as exc:  # no thread to be had: a miss, not an error on the scheduler's thread
            self._room.release()
            logger.warning("redis look-up cannot start: %s", exc)
            return None
        # the breaker half-opens by being asked, but nobody waits for it
        return None if broken else asked

    def mend(self) -> bool:
        """Whether the tier is in use.  One that is not is asked something, so that it is back before the next
        prompt needs it."""
        if any(tier.open for tier in self._tiers):
            self.ask([ChunkKey(bytes(KEY_BYTES))])
            return False
        return True

    def _prefix(self, keys: Sequence[ChunkKey]) -> int:
        try:
            return min(tier.prefix([Ref(key) for key in keys]) for tier in self._tiers)
        except CacheError as exc:
            logger.warning("redis look-up: %s", exc)
            return -1
        except Exception:  # the top of a thread
            logger.exception("redis look-up failed")
            return -1
        finally:
            self._room.release()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        for tier in self._tiers:
            tier.close()


def nobody(keys: Sequence[ChunkKey]) -> None:
    return None
