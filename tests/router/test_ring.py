"""The ring: the same order everywhere, and little of it moves."""

from collections import Counter

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
