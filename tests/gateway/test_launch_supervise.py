"""Supervision: real children that die, a clock that the test moves."""

import os
import signal
import sys

import pytest

from gateway.launch.errors import LaunchError
from gateway.launch.processes import Child, Spec, stop_all
from gateway.launch.supervise import MAX_FAILURES, Supervisor, pause_after

pytestmark = pytest.mark.e2e

LIVES = "import time; print('hello', flush=True); time.sleep(600)"
DIES = "raise SystemExit('no model here')"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def part(tmp_path):
    children = []

    def make(name: str, code: str) -> Child:
        log = tmp_path / f"{name}.log"
        ready = lambda: b"hello" in log.read_bytes()  # noqa: E731
        child = Child(Spec(name, (sys.executable, "-c", code), log, ready=ready))
        child.start()
        children.append(child)
        return child

    yield make
    stop_all(children, 0.0)


def until(condition, supervisor: Supervisor) -> None:
    """Tick until it holds; pytest's timeout bounds the wait."""
    while not condition():
        supervisor.tick()


def test_pauses_double_up_to_a_minute_and_then_end():
    assert [pause_after(n) for n in range(1, MAX_FAILURES + 2)] == [1, 2, 4, 8, 16, 32, None]


def test_a_part_that_dies_is_announced_and_started_again(part):
    said, clock = [], Clock()
    child = part("w1", LIVES)
    supervisor = Supervisor([child], said.append, lambda: False, clock)
    first = child.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: said, supervisor)
    assert "w1 was killed by SIGKILL; starting it again in 1 s" in said[0]
    supervisor.tick()
    assert child.pid == first  # not before its pause is over
    clock.now = 1.0
    until(lambda: len(said) == 2, supervisor)
    assert said[1].startswith("w1 is back after")
    assert child.pid != first


def test_one_worker_that_keeps_failing_is_left_down_while_the_other_serves(part):
    said, clock = [], Clock()
    good, bad = part("w1", LIVES), part("w2", DIES)
    supervisor = Supervisor([good, bad], said.append, lambda: False, clock)

    def given_up() -> bool:
        clock.now += 100.0
        return "left down" in said[-1] if said else False

    until(given_up, supervisor)
    supervisor.tick()
    assert good.exit_code() is None
    assert len(said) == MAX_FAILURES + 1


def test_a_stack_without_any_worker_left_ends_with_the_reason(part):
    clock = Clock()
    supervisor = Supervisor([part("w1", DIES)], lambda line: None, lambda: False, clock)

    def keep_ticking() -> None:
        while True:
            clock.now += 100.0
            supervisor.tick()

    with pytest.raises(LaunchError, match="every worker keeps failing") as caught:
        keep_ticking()
    assert "no model here" in caught.value.tail


def test_it_runs_until_told_to_stop(part):
    Supervisor([part("w1", LIVES)], lambda line: None, lambda: True).run()
