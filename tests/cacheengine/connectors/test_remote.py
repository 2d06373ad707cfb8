"""Redis is asked on a thread of its own; whatever goes wrong there is a miss."""

import threading
import time
from functools import partial

from cacheengine.connectors.remote import MAX_PROBES, Remote
from cacheengine.errors import TierDown
from cacheengine.keys import ChunkKey
from cacheengine.tier import NullTier
from cacheengine.tiers.wrap import Breaker

KEYS = [ChunkKey(bytes([n]) * 16) for n in range(5)]


class Says(NullTier):
    """Holds so many leading keys, once its gate is open; or is down."""

    def __init__(self, held: int, down: bool = False) -> None:
        self.held, self.down, self.asked = held, down, []
        self.gate = threading.Event()
        self.gate.set()

    def prefix(self, refs):
        self.asked.append(len(refs))
        self.gate.wait(10)
        if self.down:
            raise TierDown("down")
        return min(self.held, len(refs))


def test_what_one_rank_lacks_nobody_has():
    remote = Remote([Says(4), Says(2), Says(5)])
    assert remote.ask(KEYS).result(10) == 2
    remote.close()


def test_a_redis_that_is_down_could_not_say():
    remote = Remote([Says(4, down=True)])
    assert remote.ask(KEYS).result(10) == -1
    remote.close()


def test_a_broken_redis_is_asked_for_one_key_and_nobody_waits():
    tier = Says(4, down=True)
    remote = Remote([tier])
    for _ in range(3):
        remote.ask(KEYS).result(10)
    assert remote.ask(KEYS) is None
    remote.close()


def test_a_redis_that_is_back_is_in_use_before_the_next_prompt_needs_it(monkeypatch):
    monkeypatch.setattr("cacheengine.connectors.remote.Breaker", partial(Breaker, reset_seconds=0))
    tier = Says(4, down=True)
    remote = Remote([tier])
    for _ in range(3):
        remote.ask(KEYS).result(10)
    tier.down = False
    assert not remote.mend()
    deadline = time.monotonic() + 10
    while not remote.mend():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert remote.ask(KEYS).result(10) == 4
    remote.close()


def test_a_look_up_that_no_thread_could_start_is_a_miss_and_gives_its_place_back():
    tier = Says(4)
    remote = Remote([tier])
    usual = threading.stack_size(1 << 46)  # no address space holds such a stack
    try:
        assert [remote.ask(KEYS) for _ in range(2 * MAX_PROBES)] == [None] * 2 * MAX_PROBES
    finally:
        threading.stack_size(usual)
    assert remote.ask(KEYS).result(10) == 4
    assert len(tier.asked) == 1
    remote.close()


def test_beyond_so_many_waiting_look_ups_a_prompt_does_without():
    tier = Says(4)
    tier.gate.clear()
    remote = Remote([tier])
    asked = [remote.ask(KEYS) for _ in range(MAX_PROBES + 1)]
    assert asked[-1] is None
    tier.gate.set()
    assert all(one.result(10) == 4 for one in asked[:-1])
    remote.close()
