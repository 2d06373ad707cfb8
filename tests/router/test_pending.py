"""Prompts under way: the second of two equal prompts goes where the first went."""

from cacheengine.keys import KeyScheme, namespace_of
from router.pending import PendingPrefixes

SCHEME = KeyScheme(namespace_of({}), 16)
PROMPT = SCHEME.keys(range(16 * 12))
FORK = SCHEME.keys([*range(16 * 5), *range(900, 900 + 16 * 7)])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_depth_is_what_two_prompts_share() -> None:
    pending = PendingPrefixes(Clock())
    pending.sent(PROMPT, "a")
    assert pending.find(PROMPT) == ("a", 12)
    assert pending.find(PROMPT[:7]) == ("a", 7)
    assert pending.find(FORK) == ("a", 5)
    assert pending.find(FORK[5:]) == pending.find([]) == ("", 0)


def test_the_deepest_prompt_under_way_wins() -> None:
    pending = PendingPrefixes(Clock())
    pending.sent(PROMPT, "a")
    pending.sent(FORK, "b")  # the shared front now leads to b, the rest of PROMPT still to a
    assert pending.find(PROMPT) == ("a", 12)
    assert pending.find(PROMPT[:5]) == ("b", 5)


def test_what_is_under_way_for_long_is_forgotten() -> None:
    clock = Clock()
    pending = PendingPrefixes(clock, seconds=10)
    pending.sent(PROMPT, "a")
    clock.now = 11
    assert pending.find(PROMPT) == ("", 0)


def test_it_is_bounded_and_forgets_tails_first() -> None:
    pending = PendingPrefixes(Clock(), capacity=12)
    pending.sent(PROMPT, "a")
    pending.sent(SCHEME.keys(range(5000, 5000 + 16 * 4)), "b")
    assert len(pending) == 12
    assert pending.find(PROMPT) == ("a", 8)
