"""The load board: what we sent and have not seen answered."""

import random

from router.load import LoadBoard


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
    assert board.queued_tokens("a", reported=1500, beat_ms=1) == 1500  # 500 are somebody else's
    mine.done()
    assert board.queued_tokens("a", reported=1500, beat_ms=1) == 500  # same beat: ours are known to be gone
    board.start("a", 200, 0)
    assert board.queued_tokens("a", reported=1500, beat_ms=1) == 700
    assert board.queued_tokens("a", reported=0, beat_ms=2) == 200  # the worker has not seen ours yet


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
