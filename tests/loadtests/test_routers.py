"""What the comparison of gateways makes of a trace and of its measurements; the measuring needs the peers."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadtests.peers.routers import Plan, Run, bars, names_of, table
from loadtests.peers.routers_client import Client
from loadtests.peers.routers_lab import ROUTERS, Counts, Fleet
from loadtests.peers.routers_trace import Ask, arrivals, load, pooled_hits
from loadtests.replay_eviction import SAMPLE
from tests.fakes import FakeVLLM, serve

WORDS = [f"word{n}" for n in range(100)]
RUN = Run(p50=0.2, p90=0.4, p99=0.5, hit_rate=0.3, hotspot=1.1, cpu=5.0, errors=0, late=0.001)
ASKS = load(SAMPLE, WORDS, 8)


def test_prompts_share_in_words_what_they_share_in_the_trace() -> None:
    prompts = [json.loads(ask.body)["prompt"].split() for ask in ASKS[:40]]
    assert [len(prompt) for prompt in prompts] == [ask.tokens for ask in ASKS[:40]]
    for i, one in enumerate(ASKS[:40]):
        for j, other in enumerate(ASKS[:i]):
            blocks = sum(1 for a, b in zip(one.blocks, other.blocks, strict=False) if a == b)
            shared = min(blocks * 64, one.tokens, other.tokens)
            assert prompts[i][:shared] == prompts[j][:shared]


def test_requests_of_one_tick_are_spread_until_the_next() -> None:
    at = arrivals([0, 0, 0, 3000, 3000, 60_000])
    assert at == sorted(at)
    assert at[0] == 0
    assert len(set(at)) == 6
    assert at[2] < 3 + 1e-9 < at[5]
    assert max(at[3:5]) < 6
    assert at == arrivals([0, 0, 0, 3000, 3000, 60_000])


def test_a_pool_without_room_hits_nothing_and_one_with_room_what_was_seen() -> None:
    seen: set[int] = set()
    tokens = hits = 0
    for ask in ASKS:
        known = next((i for i, block in enumerate(ask.blocks) if block not in seen), len(ask.blocks))
        hits += min(known * 64, (ask.tokens - 1) // 32 * 32)
        tokens += ask.tokens
        seen |= set(ask.blocks)
    assert pooled_hits(ASKS, 10**9, 32, 8) == pytest.approx(hits / tokens)
    assert pooled_hits(ASKS, 4000, 32, 8) < hits / tokens
    assert pooled_hits(ASKS, 2, 32, 8) < 0.05


def test_full_load_keeps_an_ideal_fleet_just_busy() -> None:
    fleet = Fleet(workers=2, prefill_rate=1000)
    plan = Plan.of(ASKS, fleet, 8)
    seconds = ASKS[-1].at / plan.full
    computed = sum(ask.tokens for ask in ASKS) * (1 - plan.ceiling)
    assert computed / seconds == pytest.approx(2 * 1000)


def test_bars_hold_cairn_against_each_peers_best_policy_and_say_where_it_loses() -> None:
    slow = replace(RUN, p50=0.4, p90=0.3)
    runs = {
        ("near", "cairn predicted_ttft"): [RUN, RUN, RUN],
        ("near", "vllm-router cache_aware"): [slow, slow, slow],
        ("near", "vllm-router power_of_two"): [replace(RUN, p50=0.3, p90=0.9)] * 3,
        ("low", "cairn predicted_ttft"): [RUN],
        ("low", "smg cache_aware"): [replace(RUN, p50=0.195, p90=0.1)],
    }
    found = bars(runs)
    ratios = {name: (round(bar.value, 3), bar.ok) for name, bar in found.items()}
    assert ratios == {
        "near load, TTFT p50, Cairn / vllm-router power_of_two": (0.667, True),
        "near load, TTFT p90, Cairn / vllm-router cache_aware": (1.333, False),
        "low load, TTFT p50, Cairn / smg cache_aware": (1.026, True),
        "low load, TTFT p90, Cairn / smg cache_aware": (4.0, False),
        "Cairn's errors": (0, True),
    }
    assert table(runs, Plan(ASKS, 0.4, 1.0)).row_count == 5


def test_a_hotspot_is_the_busiest_workers_share() -> None:
    before, after = Counts((10, 10), 100, 0), Counts((40, 20), 500, 100)
    since = after.since(before)
    assert (since.hotspot, since.hit_rate) == (1.5, 0.25)


def test_a_router_nobody_knows_is_refused_with_the_known_ones() -> None:
    assert names_of(list(ROUTERS), "cairn predicted_ttft; smg cache_aware, tight")
    with pytest.raises(Exception, match="no nginx; there are cairn predicted_ttft"):
        names_of(list(ROUTERS), "nginx")


def asked(url: str, asks: list[Ask], patience: float = 20.0) -> tuple[int, list[str]]:
    outcome = asyncio.run(Client(int(url.rpartition(":")[2])).run(asks, 1e6, 1, patience))
    return len(outcome.ttfts), outcome.errors


def test_the_client_counts_answers_but_those_of_the_warm_up() -> None:
    with serve(FakeVLLM()) as url:
        assert asked(url, ASKS[:8]) == (7, [])


def test_a_refused_a_torn_and_an_unanswered_request_are_errors(tmp_path: Path) -> None:
    for worker, what in (
        (FakeVLLM(status=503), "503"),
        (FakeVLLM(die_after=1), ""),
        (FakeVLLM(gap=60), "not answered"),
    ):
        with serve(worker) as url:
            counted, errors = asked(url, ASKS[:3], patience=0.5)
        assert counted == 0
        assert len(errors) == 3
        assert all(what in error for error in errors)
