"""The replay's rule, its ceiling, and what it makes of the sample."""

import random
from itertools import chain, combinations

import pytest

from cacheengine.evict import DEFAULT_EVICTOR, EVICTORS
from cacheengine.keys import ChunkKey
from loadtests import replay_eviction
from loadtests.replay_eviction import OPTIMUM, SAMPLE, Outcome, Prompt, Shelf, bars, load, optimum, replay


def prompt(*blocks: int) -> Prompt:
    return [ChunkKey(n.to_bytes(16, "big")) for n in blocks]


def shelf(slots: int, evictor: str = "lru") -> Shelf:
    return Shelf(slots, EVICTORS[evictor]())


def random_prompts(seed: int, n: int) -> list[Prompt]:
    """Walks down one tree: a block's id is its path."""
    chance = random.Random(seed)
    walks = ([chance.choice((1, 1, 2)) for _ in range(chance.randint(1, 4))] for _ in range(n))
    return [prompt(*[int("".join(map(str, walk[: i + 1]))) for i in range(len(walk))]) for walk in walks]


def test_a_hit_is_a_prefix_that_is_held():
    one = shelf(10)
    assert one.serve(prompt(1, 2, 3)) == 0
    assert one.serve(prompt(1, 2, 4)) == 2
    assert one.serve(prompt(1, 2, 3, 5)) == 3


def test_a_prompt_is_given_up_from_its_end():
    one = shelf(4)
    one.serve(prompt(1, 2, 3))
    one.serve(prompt(7, 8))
    assert one.held() == set(prompt(1, 2, 7, 8))


def test_a_prompt_never_pushes_out_its_own_beginning():
    one = shelf(3)
    one.serve(prompt(1, 2, 3, 4, 5))
    assert one.held() == set(prompt(1, 2, 3))
    assert one.serve(prompt(1, 2, 3, 4, 5)) == 3


@pytest.mark.parametrize("name", EVICTORS)
def test_what_is_held_is_prefix_closed_and_fits(name):
    prompts = load(SAMPLE)[:150]
    parents = {key: parent for p in prompts for parent, key in zip([None, *p], p, strict=False)}
    one = shelf(300, name)
    for p in prompts:
        one.serve(p)
        held = one.held()
        assert len(held) <= 300
        assert all(parents[key] is None or parents[key] in held for key in held)


@pytest.mark.parametrize("seed", range(8))
def test_no_sequence_of_choices_beats_the_optimum(seed):
    """Every choice of what to hold after every prompt, tried in full."""
    prompts, slots = random_prompts(seed, 7), 3
    reached: dict[frozenset[ChunkKey], int] = {frozenset(): 0}
    for p in prompts:
        following: dict[frozenset[ChunkKey], int] = {}
        for held, found in reached.items():
            hits = next((i for i, key in enumerate(p) if key not in held), len(p))
            known = held | set(p)
            for kept in chain.from_iterable(combinations(known, n) for n in range(slots + 1)):
                state = frozenset(kept)
                following[state] = max(following.get(state, 0), found + hits)
        reached = following
    assert optimum(prompts, slots) == pytest.approx(max(reached.values()) / sum(map(len, prompts)))


@pytest.mark.parametrize("name", EVICTORS)
@pytest.mark.parametrize("slots", [30, 300, 1000])
def test_no_policy_beats_the_optimum(name, slots):
    prompts = load(SAMPLE)
    assert 0 < replay(prompts, slots, EVICTORS[name]()) <= optimum(prompts, slots)


def test_every_policy_finds_the_same_where_everything_fits():
    prompts = load(SAMPLE)
    slots = len(set(chain.from_iterable(prompts)))
    assert (
        len({replay(prompts, slots, make()) for make in EVICTORS.values()} | {optimum(prompts, slots)}) == 1
    )


def test_the_sample_is_a_seed_not_a_harvest():
    assert SAMPLE.stat().st_size < 150_000
    assert 300 <= len(load(SAMPLE)) <= 500


@pytest.mark.parametrize(
    "line", ["{}", "[]", "no json", '{"hash_ids": ["x"]}', '{"hash_ids": [-1]}', '{"hash_ids": [2, 1]}']
)
def test_what_is_no_trace_is_refused_with_its_line(line, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [0, 1]}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        load(path)


def test_the_bars_compare_with_each_rival_apart():
    rates = {**dict.fromkeys(EVICTORS, 0.2), DEFAULT_EVICTOR: 0.3, "lru": 0.3, OPTIMUM: 0.4}
    outcomes = {(name, slots): Outcome(rate, 0) for name, rate in rates.items() for slots in (1, 2, 3)}
    outcomes["s3fifo", 1] = Outcome(0.31, 0)
    outcomes["lfu", 2] = Outcome(0.31, 0)
    found = list(bars(outcomes, [1, 2, 3]).values())
    assert [bar.value for bar in found] == pytest.approx([2 / 3, 1, 0.75])
    assert all(bar.ok for bar in found)
    outcomes["s3fifo", 2] = Outcome(0.31, 0)
    assert not next(iter(bars(outcomes, [1, 2, 3]).values())).ok


def test_the_quick_replay_meets_its_bars(capsys):
    assert replay_eviction.main(["--quick"]) == 0
    assert "greedy_dual (default)" in capsys.readouterr().out
