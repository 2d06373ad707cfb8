"""One load board for several processes: what one sends, all know, and nobody counts for the dead."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.load import Ticket
from router.shared_load import SharedLoadBoard
from tests.router.test_load import queued_tokens

WORKERS = ("a", "b", "c", "d")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def boards(tmp_path: Path, clock: Clock) -> Iterator[tuple[SharedLoadBoard, SharedLoadBoard]]:
    SharedLoadBoard.create(tmp_path / "load", processes=3, workers=3)
    one, two = (SharedLoadBoard(tmp_path / "load", number, clock) for number in (0, 1))
    with contextlib.closing(one), contextlib.closing(two):
        yield one, two


Boards = tuple[SharedLoadBoard, SharedLoadBoard]


def test_what_one_process_sends_all_know(boards: Boards) -> None:
    one, two = boards
    first, second = one.start("a", 1000, 300), two.start("a", 50, 0)
    assert [(b.inflight("a"), b.prefilling("a")) for b in boards] == [(2, 750)] * 2
    first.first_byte()
    assert [(b.inflight("a"), b.prefilling("a")) for b in boards] == [(2, 50)] * 2
    first.done()
    second.done()
    assert [(b.inflight("a"), b.prefilling("a")) for b in boards] == [(0, 0)] * 2


def test_a_heartbeat_takes_off_what_all_processes_sent(boards: Boards) -> None:
    one, two = boards
    one.start("a", 1000, 0)
    two.start("a", 200, 0)
    assert [queued_tokens(b, "a", reported=1500, beat_ms=1) for b in boards] == [1500] * 2
    two.start("a", 100, 0)
    assert [queued_tokens(b, "a", reported=1500, beat_ms=1) for b in boards] == [1600] * 2


def test_a_forgotten_workers_place_is_somebody_elses_and_nobody_mixes_them_up(boards: Boards) -> None:
    one, two = boards
    for worker in ("a", "b", "c"):
        one.start(worker, 10, 0).done()
    assert two.inflight("a") == 0
    one.forget("a")
    one.start("d", 70, 0)
    assert (two.prefilling("a"), two.prefilling("d")) == (0, 70)


def test_a_worker_for_whom_there_is_no_place_left_is_counted_at_home(boards: Boards) -> None:
    one, two = boards
    tickets = [one.start(worker, 10, 0) for worker in WORKERS]
    assert [one.inflight(worker) for worker in WORKERS] == [1, 1, 1, 1]
    assert [two.inflight(worker) for worker in WORKERS] == [1, 1, 1, 0]
    for ticket in tickets:
        ticket.done()
    one.check()


def test_a_closed_board_counts_no_more(boards: Boards) -> None:
    one, two = boards
    one.start("a", 10, 0)
    one.close()
    one.close()
    assert two.inflight("a") == 0


CHILD = """
import sys
from pathlib import Path
from router.shared_load import SharedLoadBoard
from tests.router.test_load import queued_tokens
board = SharedLoadBoard(Path(sys.argv[1]), 2)
tickets = [board.start("a", 100, 0) for _ in range(3)]
print("sent", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_nothing_behind(boards: Boards, tmp_path: Path, clock: Clock) -> None:
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "load")]
    for _ in range(2):  # the second one takes the first one's block
        clock.now += 1
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "sent\n"
            clock.now += 1
            assert [(b.inflight("a"), b.prefilling("a")) for b in boards] == [(3, 300)] * 2
            child.kill()
            child.wait()
            clock.now += 1
            assert [(b.inflight("a"), b.prefilling("a")) for b in boards] == [(0, 0)] * 2


def test_a_pid_that_is_used_again_is_somebody_else(boards: Boards, clock: Clock) -> None:
    one, two = boards
    one.start("a", 10, 0)
    assert two.inflight("a") == 1
    one._words[one._mine + 1] -= 1  # as if the writer had been born a tick before whoever has its pid now
    clock.now += 1
    assert two.inflight("a") == 0


def test_only_a_board_with_that_block_is_opened(tmp_path: Path) -> None:
    SharedLoadBoard.create(tmp_path / "load", processes=2)
    (tmp_path / "other").write_bytes(bytes(64))
    for path, number in ((tmp_path / "load", 2), (tmp_path / "load", -1), (tmp_path / "other", 0)):
        with pytest.raises(ValueError, match="no load board with a block"):
            SharedLoadBoard(path, number)
    with pytest.raises(FileExistsError):
        SharedLoadBoard.create(tmp_path / "load", processes=2)


class ThreeProcesses(RuleBasedStateMachine):
    """Requests come and go, processes die and come back, workers leave: every board knows the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory(prefix="cairn-")
        self.path = Path(self.folder.name) / "load"
        SharedLoadBoard.create(self.path, processes=3, workers=len(WORKERS))
        self.boards = [SharedLoadBoard(self.path, number, self.clock) for number in range(3)]
        self.open: list[list[tuple[Ticket, str, list[int]]]] = [[], [], []]

    @rule(number=st.integers(0, 2), worker=st.sampled_from(WORKERS), tokens=st.integers(0, 9000))
    def start(self, number: int, worker: str, tokens: int) -> None:
        self.open[number].append((self.boards[number].start(worker, tokens, 0), worker, [tokens]))

    @rule(number=st.integers(0, 2), at=st.integers(0, 99))
    def first_byte(self, number: int, at: int) -> None:
        if held := self.open[number]:
            ticket, _, tokens = held[at % len(held)]
            ticket.first_byte()
            tokens[0] = 0

    @rule(number=st.integers(0, 2), at=st.integers(0, 99))
    def done(self, number: int, at: int) -> None:
        if held := self.open[number]:
            held.pop(at % len(held))[0].done()

    @rule(number=st.integers(0, 2), worker=st.sampled_from(WORKERS))
    def forget(self, number: int, worker: str) -> None:
        self.boards[number].forget(worker)

    @rule(number=st.integers(0, 2))
    def die_and_come_back(self, number: int) -> None:
        self.boards[number].close()
        self.open[number] = []
        self.boards[number] = SharedLoadBoard(self.path, number, self.clock)
        self.clock.now += 1

    @invariant()
    def every_board_knows_the_sum(self) -> None:
        for worker in WORKERS:
            held = [tokens[0] for mine in self.open for _, name, tokens in mine if name == worker]
            for board in self.boards:
                assert (board.inflight(worker), board.prefilling(worker)) == (len(held), sum(held))

    def teardown(self) -> None:
        for board in self.boards:
            board.close()
        self.folder.cleanup()


TestThreeProcesses = ThreeProcesses.TestCase
TestThreeProcesses.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
