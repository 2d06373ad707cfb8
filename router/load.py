"""What this gateway has sent and not yet seen answered: exact and instant, where heartbeats are late."""

from dataclasses import dataclass


@dataclass(slots=True)
class _Row:
    inflight: int = 0  # requests
    prefilling: int = 0  # prompt tokens sent, not hit, and not yet followed by a first byte
    beat_ms: float = 0  # the heartbeat `others` was taken from
    others: float = 0  # queued tokens in it that were not ours


class Ticket:
    """One request on one worker.  REQUIRES: done() in a `finally`; both verbs are idempotent."""

    __slots__ = ("_board", "_open", "_row", "_tokens", "worker_id")

    def __init__(self, board: "LoadBoard", row: _Row, worker_id: str, tokens: int) -> None:
        self._board, self._row = board, row
        self.worker_id, self._tokens = worker_id, tokens
        self._open = True

    def first_byte(self) -> None:
        """The prompt is computed."""
        self._row.prefilling -= self._tokens
        self._tokens = 0
        if self._open:
            self._board._changed(self.worker_id, self._row)

    def done(self) -> None:
        """Answered, failed or hung up."""
        if not self._open:
            return
        self._open = False
        self.first_byte()
        self._row.inflight -= 1
        self._board._changed(self.worker_id, self._row)
        self._board._settled(self.worker_id)


class LoadBoard:
    """REQUIRES: used from one event loop."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._left: set[str] = set()  # gone from the fleet, requests still open

    def start(self, worker_id: str, prompt_tokens: int, expected_hit: int) -> Ticket:
        """A request goes to this worker now."""
        tokens = max(0, prompt_tokens - expected_hit)
        row = self._rows.setdefault(worker_id, _Row())
        row.inflight += 1
        row.prefilling += tokens
        self._changed(worker_id, row)
        return Ticket(self, row, worker_id, tokens)

    def open(self, worker_id: str) -> tuple[int, int]:
        """Requests of this gateway that are open on the worker, and prompt tokens of theirs it has still to
        compute."""
        row = self._rows.get(worker_id)
        return (row.inflight, row.prefilling) if row else (0, 0)

    def inflight(self, worker_id: str) -> int:
        """The former alone."""
        return self.open(worker_id)[0]

    def prefilling(self, worker_id: str) -> int:
        """The latter alone."""
        return self.open(worker_id)[1]

    def others(self, worker_id: str, ours: int, reported: float, beat_ms: float, note: bool = True) -> float:
        """Tokens that others have queued on it, as the latest heartbeat says.

        `reported` includes `ours` as they were at the heartbeat, so ours are taken off once, when that
        heartbeat is first seen.  Without `note` this is a look, after which it was still not seen.
        """
        row = self._rows.get(worker_id) or _Row()
        if beat_ms == row.beat_ms:
            return row.others
        others = max(0.0, reported - ours)
        if note:
            row.beat_ms, row.others = beat_ms, others
            self._rows[worker_id] = row
        return others

    def forget(self, worker_id: str) -> None:
        """The worker left the fleet; its row goes as soon as nothing is open on it."""
        row = self._rows.get(worker_id)
        if row is None or row.inflight == 0:
            self._rows.pop(worker_id, None)
            self._left.discard(worker_id)
        else:
            self._left.add(worker_id)

    def _changed(self, worker_id: str, row: _Row) -> None:
        """For a board that shows its rows to others."""

    def _settled(self, worker_id: str) -> None:
        if worker_id in self._left:
            self.forget(worker_id)

    def check(self) -> None:
        """No count is negative; what has nothing open has nothing to compute."""
        for row in self._rows.values():
            assert row.inflight >= 0
            assert row.prefilling >= 0
            assert row.inflight or not row.prefilling
