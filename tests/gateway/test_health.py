"""Breakers and the retry budget, with a clock that obeys."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import Busy, TooSlow, Unreachable, Upstream
from gateway.health import (
    ENOUGH,
    FAULTS_IN_A_ROW,
    MAX_PAUSE_SECONDS,
    PAUSE_SECONDS,
    Health,
    RetryBudget,
    Trial,
)
from router.worker import Worker

FLEET = tuple(Worker(f"w{i}", f"http://w{i}", "m", boot_id="1") for i in range(4))
A, B = FLEET[:2]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class House:
    def __init__(self) -> None:
        self.clock = Clock()
        self.health = Health(self.clock)

    def fine(self, worker: Worker = A, status: int = 200) -> None:
        trial = self.health.trial(worker)
        trial.first_byte(status)
        trial.done()

    def fault(self, worker: Worker = A, times: int = 1, error: Upstream | None = None) -> None:
        for _ in range(times):
            trial = self.health.trial(worker)
            trial.failed(error or Upstream())
            trial.done()

    @property
    def state(self) -> str:
        return self.health.state(A.id)

    def out(self) -> set[str]:
        return set(self.health.out(FLEET))


def test_faults_in_a_row_take_a_worker_out_whatever_they_are() -> None:
    for error in (Upstream(), Unreachable(), Busy(), TooSlow()):
        house = House()
        house.fault(times=FAULTS_IN_A_ROW - 1, error=error)
        assert house.out() == set()
        house.fault(error=error)
        assert (house.out(), house.state) == ({"w0"}, "open")


def test_5xx_answers_are_faults_and_4xx_are_the_clients_own() -> None:
    house = House()
    for _ in range(50):
        for status in (400, 401, 404, 413, 422, 429, 501):
            house.fine(status=status)
    assert house.state == "closed"
    for _ in range(FAULTS_IN_A_ROW):
        house.fine(status=500)
    assert house.state == "open"


def test_a_client_that_left_or_does_not_read_says_nothing_of_the_worker() -> None:
    house = House()
    for _ in range(50):
        house.health.trial(A).done()
        trial = house.health.trial(A)
        trial.first_byte(200)
        trial.failed(TooSlow())
        trial.done()
    assert house.state == "closed"


def test_a_worker_that_fails_every_other_request_is_out_too() -> None:
    house = House()
    for _ in range(ENOUGH // 2):
        house.fault()
        assert house.state == "closed"
        house.fine()
    house.fault()
    assert house.state == "open"


def test_a_worker_that_breaks_every_stream_is_out_though_each_begins_well() -> None:
    house = House()
    for _ in range(ENOUGH):
        trial = house.health.trial(A)
        trial.first_byte(200)
        trial.failed(Upstream())
        trial.done()
    assert house.state == "open"


def test_after_the_pause_exactly_one_request_goes_through_and_decides() -> None:
    house = House()
    house.fault(times=FAULTS_IN_A_ROW)
    house.clock.now = PAUSE_SECONDS - 0.1
    assert house.out() == {"w0"}
    house.clock.now = PAUSE_SECONDS
    assert (house.out(), house.state) == (set(), "half_open")
    trial = house.health.trial(A)
    assert (house.out(), house.state) == ({"w0"}, "half_open")
    trial.failed(Upstream())
    trial.done()
    assert (house.out(), house.state) == ({"w0"}, "open")
    house.clock.now += 2 * PAUSE_SECONDS - 0.1  # it doubles
    assert house.out() == {"w0"}
    house.clock.now += 0.1
    house.fine()
    assert (house.out(), house.state) == (set(), "closed")


def test_a_trial_whose_client_left_is_passed_on() -> None:
    house = House()
    house.fault(times=FAULTS_IN_A_ROW)
    house.clock.now = PAUSE_SECONDS
    house.health.trial(A).done()
    assert house.out() == set()


def test_what_was_sent_before_the_breaker_opened_does_not_close_it() -> None:
    house = House()
    early = house.health.trial(A)
    house.fault(times=FAULTS_IN_A_ROW)
    early.first_byte(200)
    early.done()
    assert house.state == "open"


def test_pauses_grow_to_a_limit_and_are_forgotten_by_a_worker_that_is_well() -> None:
    house = House()
    pauses = []
    house.fault(times=FAULTS_IN_A_ROW)
    for _ in range(8):
        start = house.clock.now
        while house.state == "open":
            house.clock.now += PAUSE_SECONDS
        pauses.append(house.clock.now - start)
        house.fault()
    assert pauses == [5, 10, 20, 40, 60, 60, 60, 60]
    house.clock.now += MAX_PAUSE_SECONDS
    for _ in range(30):
        house.fine()
    house.fault(times=FAULTS_IN_A_ROW)
    house.clock.now += PAUSE_SECONDS
    assert house.state == "half_open"


def test_another_process_under_the_same_name_starts_anew() -> None:
    house = House()
    house.fault(times=FAULTS_IN_A_ROW)
    born_again = (replace(A, boot_id="2"), *FLEET[1:])
    assert house.health.out(born_again) == set()
    assert house.state == "closed"


def test_at_most_half_the_fleet_is_out_and_the_least_bad_stay() -> None:
    house = House()
    for i, worker in enumerate(FLEET):
        house.fault(worker, times=FAULTS_IN_A_ROW + i)
    assert house.out() == {"w2", "w3"}
    assert house.health.out(FLEET[:1]) == set()
    assert house.health.out(FLEET[:3]) == {"w2"}


def test_wedged_workers_may_be_all_but_one() -> None:
    house = House()
    for worker in FLEET:
        house.health.wedge(worker.id, True)
    assert len(house.out()) == len(FLEET) - 1
    assert set(house.health.out(FLEET[:1])) == set()
    house.health.wedge("w0", False)
    assert house.out() == {"w1", "w2", "w3"}
    assert house.state == "closed"


def test_who_left_is_forgotten() -> None:
    house = House()
    house.fault(times=FAULTS_IN_A_ROW)
    house.health.wedge("w0", True)
    house.health.forget("w0")
    assert (house.out(), house.state) == (set(), "closed")


EVENTS = st.tuples(
    st.sampled_from(["fine", "fault", "fault", "begin", "end", "wait", "wedge", "free"]),
    st.integers(0, 3),
    st.booleans(),
)


@given(st.lists(EVENTS, max_size=120), st.integers(1, 4))
@settings(deadline=None)
def test_whatever_happens_somebody_takes_requests_and_trials_go_one_by_one(
    events: list[tuple[str, int, bool]], size: int
) -> None:
    house, fleet = House(), FLEET[:size]
    under_way: list[Trial] = []
    wedged = set()
    for what, which, good in events:
        worker = fleet[which % size]
        match what:
            case "fine":
                house.fine(worker)
            case "fault":
                house.fault(worker)
            case "begin":
                before = house.health.state(worker.id), worker.id in house.health.out(fleet)
                under_way.append(house.health.trial(worker))
                if before == ("half_open", False) and size > 1 and len(house.health.out(fleet)) < size // 2:
                    assert worker.id in house.health.out(fleet)  # its one trial is under way
            case "end" if under_way:
                trial = under_way.pop(which % len(under_way))
                if good:
                    trial.first_byte(200)
                trial.done()
            case "wait":
                house.clock.now += PAUSE_SECONDS
            case "wedge":
                wedged.add(worker.id)
                house.health.wedge(worker.id, True)
            case "free":
                wedged.discard(worker.id)
                house.health.wedge(worker.id, False)
        out = house.health.out(fleet)
        assert len(out) < size
        assert len(set(out) - wedged) <= size // 2
        assert all(house.health.state(worker_id) != "closed" for worker_id in out)
    for trial in under_way:
        trial.done()
    house.clock.now += MAX_PAUSE_SECONDS
    assert set(house.health.out(fleet)) <= wedged  # nobody stays out for want of an end


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=300))
def test_retries_are_a_tenth_of_the_requests_and_a_reserve(events: list[tuple[bool, float]]) -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    requests = retries = 0
    for is_request, seconds in events:
        clock.now += seconds
        if is_request:
            requests += 1
            budget.earn()
        else:
            retries += budget.take()
        earned = requests * budget.SHARE + clock.now * budget.PER_SECOND
        assert retries <= budget.RESERVE + earned + 1e-6


def test_a_gateway_in_trouble_retries_every_tenth_request_and_a_quiet_one_recovers() -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    taken = 0
    for _ in range(1000):
        budget.earn()
        taken += budget.take()
    assert taken in (109, 110)
    clock.now += 1 / budget.PER_SECOND
    assert budget.take()
