"""Children, with real ones: small Python programs that misbehave on purpose."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.launch.errors import LaunchError
from gateway.launch.guard import remaining
from gateway.launch.processes import LOG_BYTES, Child, Guard, Spec, group_alive, stop_all, wait_ready

pytestmark = pytest.mark.e2e

SLEEP = "import time; print('hello', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('hello', flush=True); "
    "time.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('hello', flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def run(tmp_path):
    """run(code) → a started Child whose program has said hello; whatever is left is killed afterwards."""
    started = []

    def start(code: str, wait: bool = True, **more) -> Child:
        log = tmp_path / f"{len(started)}.log"
        child = Child(
            Spec(
                "part", (sys.executable, "-c", code), log, ready=lambda: b"hello" in log.read_bytes(), **more
            )
        )
        started.append(child)
        child.start()
        if wait:
            assert wait_ready([child], lambda c: None)
        return child

    yield start
    stop_all(started, 0.0)


def test_a_stopped_child_is_gone(run):
    child = run(SLEEP)
    child.stop()
    assert child.exit_code() == -signal.SIGTERM
    assert not group_alive(child.pid)


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(run):
    child = run(STUBBORN)
    child.stop(0.2)
    assert child.exit_code() == -signal.SIGKILL


def test_grandchildren_do_not_survive(run):
    child = run(PARENT)
    child.stop()
    assert not group_alive(child.pid)


def test_grandchildren_of_a_child_that_died_by_itself_are_stopped_too(run):
    child = run(PARENT)
    os.kill(child.pid, signal.SIGKILL)
    child.stop()
    assert not group_alive(child.pid)


def test_stopping_twice_or_before_the_start_is_fine(run, tmp_path):
    Child(Spec("idle", ("true",), tmp_path / "log", ready=lambda: True)).stop()
    child = run(SLEEP)
    child.stop()
    child.stop()


def test_death_at_start_is_a_sentence_with_the_log_and_its_last_lines(run):
    child = run("print('no such model'); raise SystemExit(3)", wait=False)
    with pytest.raises(LaunchError, match="part exited with code 3") as caught:
        wait_ready([child], lambda c: None)
    assert caught.value.log == child.spec.log
    assert "no such model" in caught.value.tail


def test_a_part_that_is_never_ready_misses_its_deadline(run):
    child = run("import time; time.sleep(600)", wait=False, deadline_seconds=0.1, hint="look outside")
    with pytest.raises(LaunchError, match=r"did not become ready .*; look outside"):
        wait_ready([child], lambda c: None)


def test_waiting_ends_when_asked_to_stop(run):
    child = run("import time; time.sleep(600)", wait=False)
    assert not wait_ready([child], lambda c: None, stopping=lambda: True)


def test_a_program_that_does_not_exist_is_a_sentence(tmp_path):
    child = Child(Spec("part", ("/no/such/program",), tmp_path / "log", ready=lambda: True))
    with pytest.raises(LaunchError, match="part cannot be run"):
        child.start()


def test_secrets_travel_over_standard_input(run):
    child = run(
        "import sys; print('hello', sys.stdin.read() == 'secret', flush=True)", wait=False, stdin=b"secret"
    )
    child._process.wait(10)
    assert "hello True" in child.tail()
    assert b"secret" not in Path(child.spec.log).read_bytes()


def test_a_child_can_be_started_again(run):
    child = run(SLEEP)
    first = child.pid
    child.stop()
    child.start()
    assert child.pid != first
    assert child.exit_code() is None


def test_a_long_log_is_moved_aside_while_the_child_writes_on(run):
    child = run(SLEEP)
    with open(child.spec.log, "ab") as log:
        log.truncate(LOG_BYTES + 1)
    child.rotate()
    assert child.spec.log.stat().st_size == 0
    assert child.spec.log.with_suffix(".log.1").stat().st_size == LOG_BYTES + 1


def test_the_guard_knows_who_remains():
    assert remaining(["+10\n", "+11\n", "-10\n", "+12\n"]) == [11, 12]


def test_a_launcher_killed_outright_leaves_nobody_behind(tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gateway.launch.processes import Child, Guard, Spec\n"
        f"log = Path({str(tmp_path / 'child.log')!r})\n"
        f"child = Child(Spec('part', (sys.executable, '-c', {SLEEP!r}), log, ready=lambda: True), Guard())\n"
        "child.start()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as launcher:
        group = int(launcher.stdout.readline())
        assert group_alive(group)
        launcher.kill()
    while group_alive(group):  # the guard notices by itself; pytest's timeout bounds the wait
        time.sleep(0.02)


def test_a_closed_guard_leaves_removed_groups_alone(run):
    guard = Guard()
    child = run(SLEEP)
    guard.add(child.pid)
    guard.remove(child.pid)
    guard.close()
    assert child.exit_code() is None
