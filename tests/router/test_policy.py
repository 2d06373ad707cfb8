"""Policies are tables: what is known in, an order of workers out."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.policy import DEFAULT_RATE, POLICIES, TIERS, Candidate, Hit, as_log, cost, decide, replay

RATE = 10_000.0
TOKEN_BYTES = 46_080.0  # SmolLM2-135M in bf16


def worker(name: str, ring: int = 0, **known: object) -> Candidate:
    base: dict[str, object] = {"prefill_rate": RATE, "token_bytes": TOKEN_BYTES, "ring": ring}
    return Candidate(name, **(base | known))  # type: ignore[arg-type]


def order(policy: str, prompt: int, *candidates: Candidate, turn: int = 0) -> str:
    return "".join(choice.candidate.worker for choice in POLICIES[policy](prompt, candidates, turn))


COLD = worker("a")
WARM = worker("b", 1, hit=Hit(device=7000))
BUSY_WARM = worker("b", 1, hit=Hit(device=7000), queued_tokens=4000, inflight=1)
SWAMPED_WARM = worker("b", 1, hit=Hit(device=7000), queued_tokens=9000, inflight=2)
COMPUTING_IT = worker("b", 1, hit=Hit(device=7000), queued_tokens=8000, pending_tokens=7000, inflight=1)
HOST_WARM = worker("b", 1, hit=Hit(host=7000), bandwidth={"host": 4e9})
CRAWLING_DISK = worker("b", 1, hit=Hit(disk=7000), bandwidth={"disk": 1e8})  # 3.2 s to load 0.7 s of work


@pytest.mark.parametrize(
    ("prompt", "candidates", "want"),
    [
        (8000, [COLD, WARM], "ba"),
        (8000, [COLD, BUSY_WARM], "ba"),  # 0.8 s of work against 0.1 s behind 0.4 s
        (8000, [COLD, SWAMPED_WARM], "ab"),  # the hit is not worth the queue
        (8000, [COLD, COMPUTING_IT], "ba"),  # unless that queue is our own prompt: wait, do not compute twice
        (8000, [COLD, HOST_WARM], "ba"),  # loading 322 MB takes 0.08 s
        (8000, [COLD, CRAWLING_DISK], "ab"),  # slower than computing: no hit at all
        (8000, [worker("a", 1), worker("b", 0)], "ba"),  # equal: ring order
        (8000, [worker("a", 0, inflight=1), worker("b", 1)], "ba"),  # within 5 %: the less loaded
        (8000, [worker("a", 0), worker("b", 1, prefill_rate=2 * RATE)], "ba"),  # twice as fast
    ],
)
def test_predicted_ttft_picks(prompt: int, candidates: list[Candidate], want: str) -> None:
    assert order("predicted_ttft", prompt, *candidates) == want


def test_a_worker_over_the_load_bound_goes_last_however_much_it_holds() -> None:
    """The ring's bound is at 1.25 times the mean and two, 4.9 here; the default's at twice and four, 8.7."""
    crowd = [worker("a", 0, inflight=7, hit=Hit(device=8000)), worker("b", 1), worker("c", 2)]
    assert order("predicted_ttft", 8000, *crowd) == "abc"
    assert order("prefix_ring", 8000, *crowd) == order("session", 8000, *crowd) == "bca"
    swamped = [worker("a", 0, inflight=20, hit=Hit(device=8000)), worker("b", 1), worker("c", 2)]
    assert order("predicted_ttft", 8000, *swamped) == "bca"


def test_a_prefix_is_computed_again_on_an_idle_fleet_and_waited_for_on_a_busy_one() -> None:
    """The holder has 0.9 s of work in front of ours in both; a second copy would spare this prompt 0.3 s."""
    holder = worker("h", 1, hit=Hit(device=6000), queued_tokens=9000)
    assert order("predicted_ttft", 8000, holder, worker("i", 0), worker("j", 2)) == "ijh"
    queues = [worker(name, n, queued_tokens=5000) for n, name in enumerate("ijkl", 2)]
    assert order("predicted_ttft", 8000, holder, worker("b", 0, queued_tokens=3000), *queues)[0] == "h"


def test_what_the_queue_adds_to_the_price_of_computing_is_bounded() -> None:
    swamped = [
        worker("a", 0, queued_tokens=10**7, hit=Hit(device=100)),
        worker("b", 1, queued_tokens=10**7 - 2000),
    ]
    assert order("predicted_ttft", 200, *swamped) == "ba"


def test_prefix_ring_keeps_ring_order() -> None:
    assert order("prefix_ring", 10, worker("a", 2), worker("b", 0), worker("c", 1)) == "bca"


def test_least_loaded_counts_requests_then_tokens() -> None:
    field = [worker("a", inflight=1), worker("b", queued_tokens=9), worker("c", queued_tokens=3)]
    assert order("least_loaded", 10, *field) == "cba"


def test_session_follows_the_ring_it_is_given() -> None:
    assert order("session", 10, worker("a", 2), worker("b", 0), worker("c", 1, hit=Hit(device=9))) == "bca"


def test_power_of_two_takes_the_less_loaded_of_the_two_it_drew() -> None:
    """Whoever is busiest of all is never first, whoever is idlest is first whenever drawn."""
    fleet = [worker(name, n, inflight=n) for n, name in enumerate("abcd")]
    orders = [order("power_of_two", 10, *fleet, turn=turn) for turn in range(200)]
    assert all(each[0] < each[1] for each in orders)
    assert {each[0] for each in orders} == {*"abc"}
    assert {each[:2] for each in orders} == {"ab", "ac", "ad", "bc", "bd", "cd"}
    assert order("power_of_two", 10, *fleet, turn=3) == order("power_of_two", 10, *reversed(fleet), turn=3)


def test_round_robin_takes_turns() -> None:
    assert [order("round_robin", 1, worker("c"), worker("a"), worker("b"), turn=i)[0] for i in range(4)] == [
        *"abca"
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_to_choose_from_is_an_empty_order(policy: str) -> None:
    assert POLICIES[policy](100, [], 3) == []


def test_a_prefix_is_loaded_up_to_the_last_tier_that_pays() -> None:
    held = worker("a", hit=Hit(device=1000, host=3000, disk=2000), bandwidth={"host": 4e9, "disk": 1e8})
    choice = cost(8000, held, RATE)
    assert choice.hit == Hit(device=1000, host=3000)
    assert choice.terms["compute"] == pytest.approx(0.4)
    assert choice.terms["transfer"] == pytest.approx(3000 * TOKEN_BYTES / 4e9)


def test_a_slow_tier_in_front_is_paid_for_when_what_lies_behind_is_worth_it() -> None:
    held = worker("a", hit=Hit(host=100, disk=5000), bandwidth={"host": 4e8, "disk": 4e9})
    assert cost(8000, held, RATE).hit == Hit(host=100, disk=5000)


def test_nothing_measured_still_gives_an_order() -> None:
    field = [Candidate("a", ring=1), Candidate("b", ring=0, hit=Hit(device=500))]
    assert order("predicted_ttft", 1000, *field) == "ba"
    assert cost(1000, field[0], DEFAULT_RATE).terms["compute"] == 1.0


candidates = st.lists(
    st.builds(
        Candidate,
        worker=st.uuids().map(str),
        ring=st.integers(0, 9),
        inflight=st.integers(0, 50),
        running=st.integers(0, 50),
        queued_tokens=st.integers(0, 10**6),
        prefill_rate=st.floats(0, 1e5),
        hit=st.builds(Hit, *[st.integers(0, 5000)] * 4),
        token_bytes=st.floats(0, 1e6),
        bandwidth=st.dictionaries(st.sampled_from(TIERS), st.floats(0, 1e11), max_size=4),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda c: c.worker,
)


NO_CLOCK = Candidate("a", prefill_rate=5e-324, hit=Hit(shared=1), token_bytes=1, bandwidth={"shared": 1e-313})


@example([NO_CLOCK], 20_000, "predicted_ttft", 0)
@example([NO_CLOCK], 20_000, "least_loaded", 0)
@given(candidates, st.integers(20_000, 100_000), st.sampled_from(sorted(POLICIES)), st.integers(0, 99))
def test_a_decision_replays_from_its_log_line(
    field: list[Candidate], prompt: int, policy: str, turn: int
) -> None:
    choices = decide(policy, prompt, field, turn)
    line = {"candidates": [as_log(c) for c in field], "ran": policy, "turn": turn, "prompt_tokens": prompt}
    assert replay(json.loads(json.dumps(line))) == [choice.candidate.worker for choice in choices]
    assert sorted(c.candidate.worker for c in choices) == sorted(c.worker for c in field)
    for choice in choices:  # a hit never makes a worker dearer than computing everything
        assert choice.terms["transfer"] + choice.terms["compute"] <= prompt / min(
            [c.prefill_rate for c in field if c.prefill_rate > 0] or [DEFAULT_RATE]
        ) * (1 + 1e-9)
