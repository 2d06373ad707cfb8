"""Where prompts part: the ring is keyed at what is a conversation's own."""

from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from router.popular import DEPTH, MANY, Forks

SCHEME = KeyScheme(namespace_of({}), 16)
SYSTEM = range(16 * 5)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def talk(user: int, chunks: int = 3, system: range = SYSTEM) -> list[ChunkKey]:
    return SCHEME.keys([*system, *range(1000 * user, 1000 * user + 16 * chunks)])


def crowd(forks: Forks, users: range) -> None:
    for user in users:
        forks.passed(talk(user))


def test_a_prompt_like_no_other_is_its_own_from_the_start() -> None:
    forks = Forks(Clock())
    assert forks.own(talk(1)) == talk(1)[0]
    forks.passed(talk(1))
    assert forks.own(talk(1)) == talk(1)[0]


def test_a_system_prompt_belongs_to_nobody_although_each_of_its_chunks_but_the_last_has_one_follower() -> (
    None
):
    forks = Forks(Clock())
    crowd(forks, range(1, MANY))
    assert forks.own(talk(99)) == talk(99)[0]
    crowd(forks, range(MANY, MANY + 1))
    assert forks.own(talk(99)) == talk(99)[5]
    assert forks.own(talk(98)) != forks.own(talk(99))


def test_a_conversation_keeps_its_key_while_it_grows() -> None:
    forks = Forks(Clock())
    crowd(forks, range(1, 20))
    keys = set()
    for chunks in range(1, 40):
        keys.add(forks.own(talk(7, chunks)))
        forks.passed(talk(7, chunks))
    assert keys == {talk(7)[5]}


def test_the_deepest_of_several_popular_forks_counts() -> None:
    forks = Forks(Clock())
    crowd(forks, range(1, 20))
    tool = [*SYSTEM, *range(7000, 7000 + 16 * 2)]
    for user in range(30, 50):
        forks.passed(SCHEME.keys([*tool, *range(1000 * user, 1000 * user + 16)]))
    assert forks.own(SCHEME.keys([*tool, *range(16)])) == SCHEME.keys([*tool, *range(16)])[7]


def test_what_was_popular_long_ago_is_not() -> None:
    clock = Clock()
    forks = Forks(clock, seconds=600)
    crowd(forks, range(1, 20))
    clock.now = 601
    assert forks.own(talk(99)) == talk(99)[0]
    crowd(forks, range(1, 20))
    assert forks.own(talk(99)) == talk(99)[5]


def test_one_chunk_and_a_prompt_that_ends_in_the_common_part_have_a_key_too() -> None:
    forks = Forks(Clock())
    crowd(forks, range(1, 20))
    common = SCHEME.keys(SYSTEM)
    assert forks.own(common) == common[0]
    assert forks.own(common[:1]) == common[0]
    forks.passed(common[:1])


def test_it_is_bounded_in_chunks_in_followers_and_in_depth() -> None:
    forks = Forks(Clock(), capacity=50)
    crowd(forks, range(1, 500))
    assert len(forks) == 50
    assert max(map(len, forks._seen.values())) == MANY
    assert forks.own(talk(999)) == talk(999)[5]  # the crowd's chunks are the youngest
    deep = Forks(Clock())
    for user in range(1, 20):
        deep.passed(talk(user, system=range(16 * (DEPTH + 9))))
    assert len(deep) == DEPTH
