"""What others sent: believed while it is fresh, then only on average."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.hearsay import LATE_SECONDS, Hearsay

WORKERS = "abcd"
tokens = st.fixed_dictionaries({worker: st.integers(0, 10**6) for worker in WORKERS})
BEATS = dict.fromkeys(WORKERS, 1.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_fresh_beat_tells_workers_apart_and_an_old_one_does_not() -> None:
    clock = Clock()
    hearsay, others = Hearsay(clock), {"a": 8000.0, "b": 0.0}
    fresh = hearsay.faded(others, {"a": 1, "b": 1})
    assert fresh["a"] > 6000 > 2000 > fresh["b"]
    clock.now += 2
    old = hearsay.faded(others, {"a": 1, "b": 1})
    assert 4000 < old["a"] < 4500
    again = hearsay.faded(others, {"a": 2, "b": 1})  # only a beat anew
    assert again["a"] == fresh["a"]
    assert again["b"] == old["b"]


@given(tokens, st.floats(0, 100))
def test_the_total_stays_the_order_stays_and_nothing_is_negative(held: dict[str, float], age: float) -> None:
    clock = Clock()
    hearsay = Hearsay(clock)
    hearsay.faded(held, BEATS)
    clock.now += age
    faded = hearsay.faded(held, BEATS)
    assert sum(faded.values()) == pytest.approx(sum(held.values()))
    assert all(tokens >= -1e-6 for tokens in faded.values())
    assert all(faded[a] <= faded[b] + 1e-6 for a in WORKERS for b in WORKERS if held[a] <= held[b])


def test_a_gateway_alone_fades_nothing() -> None:
    assert Hearsay(Clock()).faded({"a": 0.0, "b": 0.0}, {"a": 1, "b": 7}) == {"a": 0.0, "b": 0.0}
    assert Hearsay(Clock()).faded({}, {}) == {}
    assert LATE_SECONDS > 0


def test_two_models_do_not_forget_each_other_s_beats() -> None:
    clock = Clock()
    hearsay = Hearsay(clock)
    pair = {"a": 9000.0, "b": 0.0}
    hearsay.faded(pair, {"a": 1, "b": 1})
    clock.now += 3
    hearsay.faded({"x": 5.0}, {"x": 1})
    assert hearsay.faded(pair, {"a": 1, "b": 1})["a"] < 5000
