"""The ring: the same order everywhere, and little of it moves."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cacheengine.keys import digest
from router.ring import Ring

KEYS = [digest(str(i).encode()) for i in range(2000)]
FIVE = Ring("abcde")


def test_every_gateway_sees_the_same_order() -> None:
    assert all(FIVE.order(key) == Ring("edcba").order(key) for key in KEYS[:100])


def test_an_order_names_everybody_once() -> None:
    assert all(sorted(FIVE.order(key)) == [*"abcde"] for key in KEYS[:100])


def test_when_one_leaves_only_its_keys_move_and_to_the_next_in_order() -> None:
    four = Ring("abcd")
    for key in KEYS:
        assert four.order(key) == [worker for worker in FIVE.order(key) if worker != "e"]


def test_nobody_gets_more_than_twice_a_fair_share() -> None:
    firsts = Counter(FIVE.order(key)[0] for key in KEYS)
    assert max(firsts.values()) < 2 * len(KEYS) / 5


@given(st.sets(st.text("abcdef:0123456789", min_size=1, max_size=12), min_size=2, max_size=24), st.data())
def test_no_more_than_a_fair_share_of_keys_moves_when_any_worker_goes(
    members: set[str], data: st.DataObject
) -> None:
    """Only its own keys move, and it had no more than 1/N of them and what chance adds: a third for where its
    points on the ring fell, and four standard deviations of the sample."""
    gone = data.draw(st.sampled_from(sorted(members)))
    before, after = Ring(members), Ring(members - {gone})
    sample = KEYS[:500]
    moved = sum(before.order(key)[0] != after.order(key)[0] for key in sample)
    assert all(before.order(key)[0] == after.order(key)[0] for key in sample if before.order(key)[0] != gone)
    fair = 1 / len(members)
    assert moved / len(sample) <= fair * 4 / 3 + 4 * math.sqrt(fair / len(sample))
