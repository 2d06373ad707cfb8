"""The simulated fleet keeps its rules, the twin answers as the index does, the bars say what they mean."""

import asyncio
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheengine.index_schema import SHARED
from cacheengine.keys import ChunkKey
from loadtests import arrivals, replay_routing
from loadtests.arrivals import THINK_SECONDS, Arrivals
from loadtests.fleet_sim import CHUNK_TOKENS, Capacity, Clock, LocalTiers, Request, SharedTier, fleet, oracle
from loadtests.replay_routing import DEFAULT, ONE_PROMPT, SAMPLE, TRACE, Bench, Case, Outcome, bars
from tests.conftest import ValkeyServer


def prompt(*blocks: int) -> list[ChunkKey]:
    return [ChunkKey(n.to_bytes(16, "big")) for n in blocks]


def request(at: float, *blocks: int, output: int = 50, session: bytes = b"s") -> Request:
    return Request(at, prompt(*blocks), CHUNK_TOKENS * len(blocks), output, session)


class Told:
    """An index that remembers what it was told last."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, ChunkKey], int] = {}

    def publish(self, worker, entries):
        self.held |= {(worker, entry.key): entry.bits for entry in entries}


walks = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=25)


def tree_prompt(walk: list[int]) -> list[ChunkKey]:
    return prompt(*(int("".join(map(str, walk[: i + 1]))) for i in range(len(walk))))


@given(walks)
def test_tiers_are_prefix_closed_bounded_and_filled_by_recency(walked):
    tiers, known = LocalTiers(Capacity(2, 3, 4, 0)), set()
    for walk in walked:
        used = tree_prompt(walk)
        before = {key: tiers.bit(key) for key in known | set(used)}
        moved = tiers.use(used)
        known |= set(used)
        assert moved >= {key for key in known if tiers.bit(key) != before.get(key, 0)}
        counts = [sum(tiers.bit(key) == bit for key in known) for bit in (1, 2, 4)]
        assert counts == [min(2, len(known)), min(3, max(0, len(known) - 2)), min(4, max(0, len(known) - 5))]
        for each in map(tree_prompt, walked):
            held = [tiers.bit(key) > 0 for key in each]
            assert held == sorted(held, reverse=True)
            assert tiers.depth(each) == sum(held)


@given(walks)
def test_what_workers_tell_the_index_is_what_they_hold(walked):
    clock, told, chance = Clock(), Told(), random.Random(1)
    workers = fleet(clock, 3, Capacity(2, 2, 2, 6), told)
    for walk in walked:
        chance.choice(workers)._store(tree_prompt(walk))
    for (number, key), bits in told.held.items():
        assert bits == workers[number].bits(key)
    for worker in workers:
        for walk in walked:  # closed over local and shared tiers together: the index relies on it
            held = [worker.bits(key) > 0 for key in tree_prompt(walk)]
            assert held == sorted(held, reverse=True)


def test_what_leaves_the_shared_tier_is_taken_back_by_all_who_told_of_it():
    shared = SharedTier(2)
    assert shared.use(prompt(1, 2), 0) == (set(prompt(1, 2)), [])
    assert shared.use(prompt(1, 2), 5)[0] == set(prompt(1, 2))
    assert shared.use(prompt(1, 3), 5) == (set(prompt(3)), [(prompt(2)[0], {0, 5})])
    assert shared.depth(prompt(1, 3, 4), 0) == 2


def test_a_worker_computes_one_prompt_at_a_time_and_finds_what_it_computed():
    clock, told = Clock(), Told()
    worker = fleet(clock, 1, Capacity(50, 50, 50, 50), told)[0]
    first, second = request(0, *range(1, 21)), request(0, *range(1, 21), 99)
    worker.arrive(first)
    worker.arrive(second)
    clock.advance(1000)
    assert first.hit == 0
    assert first.ttft == pytest.approx(20 * CHUNK_TOKENS / 10_000)
    assert second.hit == 20 * CHUNK_TOKENS
    assert second.ttft == pytest.approx(first.ttft + CHUNK_TOKENS / 10_000 * 1.01)
    assert (worker.queued, worker.running, worker.loading) == (0, 0, 0)
    assert told.held[0, prompt(1)[0]] & SHARED


def test_the_oracle_is_one_cache_that_learns_at_once():
    asked = [request(0, 1, 2), request(0, 1, 2, 3), request(0, 7, 8), request(0, 1, 2, 3)]
    assert oracle(asked, None) == 5 * CHUNK_TOKENS
    assert oracle(asked, 3) == 3 * CHUNK_TOKENS  # 7 and 8 cost 2 and 3


def test_nobody_asks_about_an_answer_before_it_was_given():
    clock = Clock()
    asked = [request(0, 1, 2, 3), request(1, 1, 2, 9, 9, session=b"t"), request(2, 1, 2, 3, 4)]
    arriving = Arrivals(asked)
    first = arriving.next(clock)
    arriving.watch(first, clock)
    other = arriving.next(clock)
    arriving.watch(other, clock)
    assert (first, other) == (asked[0], asked[1])
    clock.at(60, lambda: first.on_done(first))
    assert arriving.next(clock) is asked[2]
    assert asked[2].at == clock.now == 60 + THINK_SECONDS
    assert arriving.next(clock) is None


def test_a_load_of_one_half_takes_twice_as_long():
    asked = arrivals.load(SAMPLE)
    half, whole = (arrivals.paced(asked, 4, load, 3_000_000)[-1].at for load in (0.5, 1.0))
    assert 1.9 < half / whole < 2.2  # decoding slows computing, less so at half the load
    assert arrivals.paced(asked, 8, 1.0, 3_000_000)[-1].at < whole


def test_requests_of_one_second_are_spread_over_it():
    asked = arrivals.load(SAMPLE)
    assert len({each.at for each in asked}) > 0.99 * len(asked)
    assert all(one.at <= other.at for one, other in itertools.pairwise(asked))


def test_what_is_no_trace_is_refused_with_its_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(SAMPLE.read_text().splitlines()[0] + '\n{"hash_ids": [1]}\n')
    with pytest.raises(ValueError, match="line 2"):
        arrivals.load(path)


@pytest.mark.parametrize("gateways", [1, 3])
def test_the_twin_answers_as_the_real_index_does(valkey: ValkeyServer, gateways: int):
    asked, case = arrivals.load(SAMPLE)[:120], Case(TRACE, DEFAULT, 4, gateways, 0.6)
    real, twin = (asyncio.run(Bench(url, asked, 0.6).run(case)) for url in (valkey.unix_url, ""))
    assert real == twin
    assert 0 < real.hits <= 1.1


def test_the_bars_take_the_worst_and_compare_within_one_fleet():
    good = Outcome(0.99, 0.9, 0, 1, 1.1, 0.6, 1, 2.0, 3)
    outcomes = {
        Case(TRACE, DEFAULT, 4, 1, 0.6): good,
        Case(TRACE, DEFAULT, 16, 1, 0.6): good._replace(hits=0.96, p90=1.0),
        Case(TRACE, "session", 4, 1, 0.6): good._replace(p90=4.0),
        Case(TRACE, "least_loaded", 4, 1, 0.6): good._replace(p90=2.5),
        Case(ONE_PROMPT, DEFAULT, 16, 1, 0.6): good._replace(hotspot=1.4),
        Case(ONE_PROMPT, "session", 16, 1, 0.6): good._replace(hotspot=9),
    }
    found = bars(outcomes, 0.97)
    assert {name: bar.value for name, bar in found.items()} == pytest.approx(
        {
            "hits / oracle, 1 gateways": 0.96,
            "TTFT p90 / best other policy, load 0.6": 0.8,
            "hotspot, one system prompt": 1.4,
        }
    )
    assert [bar.ok for bar in found.values()] == [False, True, False]


def test_a_small_sweep_ends_with_its_line(capsys):
    code = replay_routing.main(
        ["--quick", "--twin", "--policies", DEFAULT, "--gateways", "2", "--loads", "0.3"]
    )
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert line["bench"] == "replay_routing"
    assert line["bars"]["hotspot, one system prompt"]["ok"]


def test_a_policy_nobody_knows_is_refused(capsys):
    with pytest.raises(SystemExit):
        replay_routing.main(["--policies", "wishful"])
    assert "wishful" in capsys.readouterr().err
