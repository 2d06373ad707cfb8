"""One contract for every policy, and each policy's own promise."""

from itertools import islice
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cacheengine.config import CacheConfig
from cacheengine.evict import DEFAULT_EVICTOR, EVICTORS, LFU, LRU, S3FIFO, Evictor, Ghost, GreedyDual
from cacheengine.keys import ChunkKey


def key(n: int) -> ChunkKey:
    return ChunkKey(n.to_bytes(16, "big"))


def numbers(evictor: Evictor) -> list[int]:
    return [int.from_bytes(k, "big") for k in evictor.victims()]


def filled(evictor: Evictor, *held: int) -> Evictor:
    for n in held:
        evictor.add(key(n), 0)
    return evictor


def use(evictor: Evictor, *used: int) -> None:
    for n in used:
        evictor.hit(key(n))


def evict(evictor: Evictor) -> int:
    victim = next(evictor.victims())
    evictor.forget(victim)
    return int.from_bytes(victim, "big")


def scan(evictor: Evictor, free: int, fresh: range) -> None:
    """Keys that are used once come to a shelf with so many free slots."""
    for i, n in enumerate(fresh):
        if i >= free:
            evict(evictor)
        evictor.add(key(n), 0)


@pytest.fixture(params=EVICTORS)
def evictor(request) -> Evictor:
    return EVICTORS[request.param]()


def test_the_knob_knows_every_policy_and_has_the_default():
    knob = CacheConfig.model_fields["eviction"]
    assert set(get_args(knob.annotation)) == set(EVICTORS)
    assert knob.default == DEFAULT_EVICTOR


def test_an_empty_one_has_no_victims(evictor):
    assert numbers(evictor) == []


def test_every_held_key_is_a_victim_exactly_once(evictor):
    filled(evictor, *range(20))
    use(evictor, 3, 3, 3, 3, 7, 7, 1)
    assert sorted(numbers(evictor)) == list(range(20))
    assert sorted(numbers(evictor)) == list(range(20))  # asking changes nothing


def test_what_is_forgotten_is_no_victim(evictor):
    filled(evictor, *range(5))
    use(evictor, 2, 2)
    evictor.forget(key(2))
    assert sorted(numbers(evictor)) == [0, 1, 3, 4]


def test_unknown_keys_may_be_forgotten_and_are_not_hit(evictor):
    filled(evictor, 1)
    evictor.forget(key(9))
    evictor.hit(key(9))
    assert numbers(evictor) == [1]
    evictor.forget(key(1))
    evictor.hit(key(1))
    evictor.forget(key(1))
    assert numbers(evictor) == []


def test_what_comes_back_is_a_victim_again(evictor):
    filled(evictor, 1, 2)
    evictor.forget(key(1))
    evictor.add(key(1), 0)
    assert sorted(numbers(evictor)) == [1, 2]


def test_a_key_that_is_added_twice_is_held_once(evictor):
    filled(evictor, 1, 2, 1)
    assert sorted(numbers(evictor)) == [1, 2]
    evictor.forget(key(1))
    assert numbers(evictor) == [2]


def test_a_caller_may_stop_reading_and_change_what_it_likes(evictor):
    filled(evictor, *range(10))
    gone = set()
    for n in range(10, 30):
        gone.add(evict(evictor))
        filled(evictor, n)
        use(evictor, n)
    assert len(gone) == 20
    assert sorted(numbers(evictor)) == sorted(set(range(30)) - gone)


class Machine(RuleBasedStateMachine):
    """Any sequence of calls, beside a set that knows what is held."""

    make = LRU
    keys = st.integers(0, 12)

    def __init__(self) -> None:
        super().__init__()
        self.evictor: Evictor = self.make()
        self.held: set[int] = set()

    @rule(n=keys, depth=st.integers(0, 40))
    def add(self, n: int, depth: int) -> None:
        self.evictor.add(key(n), depth)
        self.held.add(n)

    @rule(n=keys, times=st.integers(1, 12))
    def hit(self, n: int, times: int) -> None:
        use(self.evictor, *[n] * times)

    @rule(n=keys)
    def forget(self, n: int) -> None:
        self.evictor.forget(key(n))
        self.held.discard(n)

    @rule(wanted=st.integers(1, 12))
    def make_room(self, wanted: int) -> None:
        for _ in range(min(wanted, len(self.held))):
            self.held.remove(evict(self.evictor))

    @rule(skipped=st.integers(0, 12))
    def evict_past_what_is_leased(self, skipped: int) -> None:
        for victim in islice(self.evictor.victims(), skipped, skipped + 1):
            self.evictor.forget(victim)
            self.held.remove(int.from_bytes(victim, "big"))

    @invariant()
    def the_victims_are_what_is_held(self) -> None:
        assert sorted(numbers(self.evictor)) == sorted(self.held)

    @invariant()
    def a_ghost_is_no_larger_than_what_is_held(self) -> None:
        ghost = getattr(self.evictor, "_ghost", Ghost())
        assert len(ghost) <= len(self.held)


@pytest.mark.parametrize("name", EVICTORS)
def test_no_sequence_of_calls_loses_or_invents_a_key(name):
    machine = type(name, (Machine,), {"make": staticmethod(EVICTORS[name])}).TestCase
    machine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    machine("runTest").runTest()


def test_lru_gives_up_the_least_recently_used_first():
    evictor = filled(LRU(), 1, 2, 3)
    use(evictor, 1)
    filled(evictor, 2)
    assert numbers(evictor) == [3, 1, 2]


def test_a_prompt_used_deepest_first_keeps_its_root_longest():
    evictor = filled(LRU(), 0, 1, 2)
    use(evictor, 2, 1, 0)
    assert numbers(evictor) == [2, 1, 0]


def test_fifo_gives_up_the_oldest_however_much_it_is_used():
    evictor = filled(EVICTORS["fifo"](), 1, 2, 3)
    use(evictor, 1, 1)
    filled(evictor, 1)
    assert numbers(evictor) == [1, 2, 3]


def test_mru_gives_up_the_most_recently_used_first():
    evictor = filled(EVICTORS["mru"](), 1, 2, 3)
    use(evictor, 1)
    assert numbers(evictor) == [1, 3, 2]


def test_lfu_gives_up_the_least_used_first_and_among_equals_the_least_recent():
    evictor = filled(LFU(), 1, 2, 3, 4)
    use(evictor, 3, 3, 1, 2)
    assert numbers(evictor) == [4, 1, 2, 3]


def test_lfu_counts_no_further_than_a_byte():
    evictor = filled(LFU(), 1, 2)
    use(evictor, *[1] * 1000, *[2] * 300)
    assert numbers(evictor) == [1, 2]


def test_s3fifo_sends_what_was_used_twice_to_the_main_queue():
    evictor = filled(S3FIFO(), 1, 2, 3)
    use(evictor, 1, 1, 2)
    assert evict(evictor) == 2  # once is not enough
    assert numbers(evictor) == [3, 1]


def test_s3fifo_believes_what_returns_from_its_ghost():
    evictor = filled(S3FIFO(), 1, 2, 3)
    assert evict(evictor) == 1
    filled(evictor, 1)
    assert numbers(evictor) == [2, 3, 1]


def test_s3fifo_gives_a_used_key_of_the_main_queue_another_round():
    evictor = filled(S3FIFO(), *range(10))
    use(evictor, *[n for n in range(9) for _ in range(2)])
    assert evict(evictor) == 9  # the small queue's only one: the others went on to the main queue
    use(evictor, 0)
    assert numbers(evictor) == [*range(1, 9), 0]


@pytest.mark.parametrize("name", ["s3fifo", "greedy_dual", "lfu"])
def test_a_scan_of_ten_capacities_does_not_flush_what_is_used_meanwhile(name):
    evictor = filled(EVICTORS[name](), *range(50))
    for _ in range(20):
        use(evictor, *range(50))
    scan(evictor, 50, range(900, 1000))
    for start in range(1000, 2000, 200):  # four times what is left beside the hot set
        scan(evictor, 0, range(start, start + 200))
        assert set(range(50)) <= set(numbers(evictor))
        use(evictor, *range(50))


def test_a_scan_of_ten_capacities_of_keys_used_once_does_not_flush_the_hot_set_of_s3fifo():
    evictor = filled(S3FIFO(), *range(50))
    use(evictor, *[n for n in range(50) for _ in range(3)])
    scan(evictor, 50, range(1000, 2000))
    assert set(range(50)) <= set(numbers(evictor))


def test_a_scan_flushes_lru():
    """The foil of the two above: the scan is long enough to matter."""
    evictor = filled(LRU(), *range(50))
    use(evictor, *[n for n in range(50) for _ in range(3)])
    scan(evictor, 50, range(1000, 2000))
    assert not set(range(50)) & set(numbers(evictor))


def test_greedy_dual_gives_a_second_use_more_time():
    evictor = filled(GreedyDual(), 1, 2, 3)
    use(evictor, 1)
    assert numbers(evictor) == [2, 3, 1]
    assert [evict(evictor), evict(evictor)] == [2, 3]
    filled(evictor, 4)  # the clock has not passed 1 yet
    assert numbers(evictor) == [1, 4]


def test_greedy_dual_gives_up_in_the_end_what_was_hot_once():
    evictor = filled(GreedyDual(), 0)
    use(evictor, *[0] * 1_000_000)
    scan(evictor, 9, range(1, 200))
    assert 0 not in numbers(evictor)


def test_greedy_dual_remembers_the_uses_of_what_left():
    evictor = filled(GreedyDual(), 1, 2, 3)
    use(evictor, 1)
    evictor.forget(key(1))
    filled(evictor, 4, 1)
    use(evictor, 4)
    assert numbers(evictor) == [2, 3, 4, 1]  # 1 has three uses now, 4 has two
