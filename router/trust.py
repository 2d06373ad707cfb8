"""Is the index right about a worker?  What it claimed, against what the worker then said it found.

Each worker is judged twice: by what it holds itself ("local") and by what it loads from the shared tier
("shared"), where blobs may go without anybody's fault.  Precision is the share of claimed tokens that came
true, over a window that halves every 30 seconds.

    UNKNOWN   too little heard lately; the index is believed
    EXACT     the index is believed, and was right
    STALE     it was wrong too often: its claims count for nothing, but are still compared (probation), so
              that a worker whose entries are right again, or of whom nothing is heard, is believed again
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from router.worker import Worker

UNKNOWN, EXACT, STALE = STATES = ("UNKNOWN", "EXACT", "STALE")
Part = Literal["local", "shared"]
PARTS: tuple[Part, ...] = ("local", "shared")

HALF_LIFE = 30.0  # seconds
WRONG_BELOW = 0.7  # precision
RIGHT_FROM = 0.8  # and back; apart, so that it does not flap
ENOUGH = 3  # answers before somebody is found wrong
FADED = 0.5  # answers, decayed, that say nothing any more: one after 30 s, three at once after 80 s


@dataclass(slots=True)
class _Row:
    boot_id: str  # a new process is a new worker
    at: float
    heard: int = 0  # answers
    answers: float = 0.0  # these three decay together
    claimed: float = 0.0  # tokens
    found: float = 0.0
    stale: bool = False

    @property
    def precision(self) -> float:
        return self.found / self.claimed


class Trust:
    """REQUIRES: written from one event loop; reading from other threads is fine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[tuple[str, Part], _Row] = {}

    def heard(self, worker: Worker, part: Part, claimed: int, found: int) -> None:
        """The index claimed so many tokens, and the worker had `found` of them."""
        if claimed <= 0:
            return
        now = self._clock()
        row = self._row(worker, part)
        if row is None:
            row = self._rows[worker.id, part] = _Row(worker.boot_id, now)
        left = 0.5 ** ((now - row.at) / HALF_LIFE)
        row.at = now
        row.heard += 1
        row.answers = row.answers * left + 1
        row.claimed = row.claimed * left + claimed
        row.found = row.found * left + min(claimed, max(0, found))
        if row.stale:
            row.stale = row.precision < RIGHT_FROM
        else:
            row.stale = row.heard >= ENOUGH and row.precision < WRONG_BELOW

    def believes(self, worker: Worker, part: Part) -> bool:
        """Whether to count on what the index claims of it."""
        row = self._rows.get((worker.id, part))
        if row is None or not row.stale:  # nearly always, and asked for every candidate
            return True
        return self.state(worker, part) != STALE

    def state(self, worker: Worker, part: Part) -> str:
        """UNKNOWN, EXACT or STALE."""
        row = self._row(worker, part)
        if row is None:
            return UNKNOWN
        if row.stale:
            return STALE
        return EXACT if row.precision >= WRONG_BELOW else UNKNOWN

    def precision(self, worker: Worker, part: Part) -> float | None:
        """0 to 1; None when nothing was heard lately."""
        row = self._row(worker, part)
        return None if row is None else row.precision

    def describe(self, worker: Worker) -> dict[str, dict[str, Any]]:
        """Both parts in plain types."""
        return {
            part: {"state": self.state(worker, part), "precision": self.precision(worker, part)}
            for part in PARTS
        }

    def forget(self, worker_id: str) -> None:
        """The worker left the fleet."""
        for part in PARTS:
            self._rows.pop((worker_id, part), None)

    def _row(self, worker: Worker, part: Part) -> _Row | None:
        """None: nothing was heard of this process lately."""
        row = self._rows.get((worker.id, part))
        if row is None or row.boot_id != worker.boot_id:
            return None
        left = 0.5 ** ((self._clock() - row.at) / HALF_LIFE)
        return row if row.answers * left >= FADED else None
