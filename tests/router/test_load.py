"""The load board: what we sent and have not seen answered."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.load import LoadBoard, Ticket


def queued_tokens(board: LoadBoard, worker_id: str, reported: float, beat_ms: float) -> float:
    """Tokens in front of a new request: ours as of now, and others' as the latest heartbeat says."""
    ours = board.prefilling(worker_id)
    return ours + board.others(worker_id, ours, reported, beat_ms)


def test_a_request_counts_until_its_first_byte_and_until_it_is_done() -> None:
    board = LoadBoard()
    ticket = board.start("a", 1000, 300)
    assert (board.inflight("a"), board.prefilling("a")) == (1, 700)
    ticket.first_byte()
    assert (board.inflight("a"), board.prefilling("a")) == (1, 0)
    ticket.done()
    assert board.inflight("a") == 0


def test_both_verbs_are_idempotent_in_any_order() -> None:
    board = LoadBoard()
    ticket, other = board.start("a", 1000, 0), board.start("a", 50, 0)
    for verb in (ticket.first_byte, ticket.first_byte, ticket.done, ticket.done, ticket.first_byte):
        verb()
    assert (board.inflight("a"), board.prefilling("a")) == (1, 50)
    other.done()
    board.check()


def test_a_hit_larger_than_the_prompt_is_no_negative_work() -> None:
    board = LoadBoard()
    board.start("a", 100, 128)
    assert board.prefilling("a") == 0


def test_the_queue_is_ours_now_plus_what_the_heartbeat_says_of_others() -> None:
    board = LoadBoard()
    mine = board.start("a", 1000, 0)
    assert queued_tokens(board, "a", reported=1500, beat_ms=1) == 1500  # 500 are somebody else's
    mine.done()
    assert queued_tokens(board, "a", reported=1500, beat_ms=1) == 500  # same beat: ours are known to be gone
    board.start("a", 200, 0)
    assert queued_tokens(board, "a", reported=1500, beat_ms=1) == 700
    assert queued_tokens(board, "a", reported=0, beat_ms=2) == 200  # the worker has not seen ours yet


def test_a_worker_that_left_is_forgotten_when_its_last_request_ends() -> None:
    board = LoadBoard()
    ticket = board.start("a", 100, 0)
    board.forget("a")
    assert board.inflight("a") == 1
    ticket.done()
    assert board._rows == {}
    ticket.done()
    ticket.first_byte()
    board.forget("never seen")
    board.check()


def test_a_request_to_a_worker_that_left_keeps_no_row_behind() -> None:
    board = LoadBoard()
    first = board.start("a", 100, 0)
    board.forget("a")
    second = board.start("a", 100, 0)  # chosen just before the worker left
    first.done()
    second.done()
    assert board._rows == {}


def test_ten_thousand_random_steps_leave_the_books_at_zero() -> None:
    board, rng, live = LoadBoard(), random.Random(0), []
    for _ in range(10_000):
        verb = rng.choice(["start", "start", "first", "done", "forget"])
        if verb == "start":
            live.append(board.start(rng.choice("abc"), rng.randint(0, 9000), rng.randint(0, 9000)))
        elif verb == "forget":
            board.forget(rng.choice("abc"))
        elif live and verb == "first":
            rng.choice(live).first_byte()
        elif live:
            live.pop(rng.randrange(len(live))).done()
        board.check()
    for ticket in live:
        ticket.done()
    assert all(board.inflight(w) == board.prefilling(w) == 0 for w in "abc")


class SeveralGateways(RuleBasedStateMachine):
    """One worker, three gateways that know each other only from its heartbeat.

    What a gateway believes is what it has sent itself, now, and what the others had sent at the heartbeat:
    nothing twice, nothing for ever.  A heartbeat that is seen late is wrong by no more than what the gateway
    itself sent or got back in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.boards = [LoadBoard() for _ in range(3)]
        self.open: list[list[tuple[Ticket, list[int]]]] = [[], [], []]
        self.beat, self.reported, self.at_beat = 0.0, 0, [0, 0, 0]
        self.seen = [True, True, True]
        self.slack = [0, 0, 0]

    def sent(self, number: int) -> int:
        return sum(tokens[0] for _, tokens in self.open[number])

    @rule(number=st.integers(0, 2), tokens=st.integers(0, 9000))
    def start(self, number: int, tokens: int) -> None:
        self.open[number].append((self.boards[number].start("w", tokens, 0), [tokens]))

    @rule(number=st.integers(0, 2), at=st.integers(0, 99))
    def first_byte(self, number: int, at: int) -> None:
        if held := self.open[number]:
            ticket, tokens = held[at % len(held)]
            ticket.first_byte()
            tokens[0] = 0

    @rule(number=st.integers(0, 2), at=st.integers(0, 99))
    def done(self, number: int, at: int) -> None:
        if held := self.open[number]:
            held.pop(at % len(held))[0].done()

    @rule()
    def heartbeat(self) -> None:
        self.beat += 1
        self.at_beat = [self.sent(number) for number in range(3)]
        self.reported = sum(self.at_beat)
        self.seen = [False, False, False]

    @rule(number=st.integers(0, 2))
    def crash(self, number: int) -> None:
        """Its connections break, so the worker drops what it sent; a new process knows nothing."""
        self.open[number] = []
        self.boards[number] = LoadBoard()
        self.seen[number] = False

    @rule(number=st.integers(0, 2))
    def look(self, number: int) -> None:
        queued = queued_tokens(self.boards[number], "w", self.reported, self.beat)
        if not self.seen[number]:
            self.seen[number] = True
            self.slack[number] = abs(self.sent(number) - self.at_beat[number])
        others = self.reported - self.at_beat[number]
        assert abs(queued - (self.sent(number) + others)) <= self.slack[number]

    @invariant()
    def the_books_are_right(self) -> None:
        for number, board in enumerate(self.boards):
            board.check()
            assert (board.inflight("w"), board.prefilling("w")) == (
                len(self.open[number]),
                self.sent(number),
            )

    def teardown(self) -> None:
        for number, board in enumerate(self.boards):
            for ticket, _ in self.open[number]:
                ticket.done()
            assert queued_tokens(board, "w", reported=0, beat_ms=self.beat + 1) == 0


TestSeveralGateways = SeveralGateways.TestCase
TestSeveralGateways.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
