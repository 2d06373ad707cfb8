"""Claims against answers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.trust import EXACT, FADED, HALF_LIFE, RIGHT_FROM, STALE, UNKNOWN, WRONG_BELOW, Trust
from router.worker import Worker

A = Worker("a", "http://a:1", "m", boot_id="1")


class Court:
    def __init__(self) -> None:
        self.now = 1000.0
        self.trust = Trust(lambda: self.now)

    def hear(self, *shares: float, part: str = "local", worker: Worker = A) -> str:
        for share in shares:
            self.trust.heard(worker, part, 1000, int(1000 * share))  # type: ignore[arg-type]
            self.now += 0.5
        return self.trust.state(worker, part)  # type: ignore[arg-type]


@pytest.fixture
def court() -> Court:
    return Court()


def test_nobody_is_known_before_the_first_answer(court: Court) -> None:
    assert court.trust.state(A, "local") == UNKNOWN
    assert court.trust.believes(A, "local")
    assert court.trust.precision(A, "local") is None


def test_a_worker_that_had_what_was_claimed_is_exact(court: Court) -> None:
    assert court.hear(1.0) == EXACT
    assert court.hear(5.0, 0.9) == EXACT  # more than was claimed is no merit
    assert court.trust.precision(A, "local") == pytest.approx(0.966, abs=0.01)


def test_one_bad_answer_is_bad_luck_and_three_are_a_verdict(court: Court) -> None:
    assert court.hear(0.0) == UNKNOWN
    assert court.hear(0.0) == UNKNOWN
    assert court.trust.believes(A, "local")
    assert court.hear(0.0) == STALE
    assert not court.trust.believes(A, "local")


def test_a_stale_worker_recovers_by_its_answers(court: Court) -> None:
    court.hear(0.0, 0.0, 0.0)
    states = [court.hear(1.0) for _ in range(30)]
    assert states[0] == STALE
    assert states[-1] == EXACT
    assert states == sorted(states, key=[STALE, EXACT].index)  # and does not flap


def test_a_worker_nobody_hears_of_is_believed_again_and_judged_anew(court: Court) -> None:
    court.hear(0.0, 0.0, 0.0)
    court.now += 2 * HALF_LIFE
    assert court.trust.state(A, "local") == STALE
    court.now += 2 * HALF_LIFE
    assert court.trust.state(A, "local") == UNKNOWN
    assert court.hear(1.0) == EXACT


def test_a_restart_is_a_clean_slate(court: Court) -> None:
    court.hear(0.0, 0.0, 0.0)
    assert court.trust.state(replace(A, boot_id="2"), "local") == UNKNOWN


def test_blobs_that_went_do_not_discredit_what_a_worker_holds_itself(court: Court) -> None:
    court.hear(0.0, 0.0, 0.0, part="shared")
    court.hear(1.0)
    described = court.trust.describe(A)
    assert (described["local"]["state"], described["shared"]["state"]) == (EXACT, STALE)


def test_no_claim_is_no_evidence_and_a_worker_that_left_is_forgotten(court: Court) -> None:
    court.trust.heard(A, "local", 0, 500)
    assert court.trust.precision(A, "local") is None
    court.hear(0.0, 0.0, 0.0)
    court.trust.forget("a")
    court.trust.forget("nobody")
    assert court.trust.state(A, "local") == UNKNOWN


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10_000), st.integers(0, 20_000)), max_size=60))
def test_whatever_is_heard_the_verdict_follows_from_the_books(heard: list[tuple[float, int, int]]) -> None:
    court = Court()
    for wait, claimed, found in heard:
        court.now += wait
        court.trust.heard(A, "local", claimed, found)
        precision = court.trust.precision(A, "local")
        assert precision is not None
        assert 0 <= precision <= 1
        state = court.trust.state(A, "local")
        assert state != EXACT or precision >= WRONG_BELOW
        assert state != STALE or precision < RIGHT_FROM
        row = court.trust._rows["a", "local"]
        assert row.answers >= FADED
        assert row.found <= row.claimed * (1 + 1e-9)
