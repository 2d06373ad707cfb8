"""What this gateway's own requests say of each worker, and who gets no new ones for it.

Three things keep requests from a worker, one purpose each:

* the registry: nobody is there.  A request could not connect, or /health does not answer; /health decides
  when it is back.  Immediate, and for the whole fleet if need be.
* the breaker, here: somebody is there and does not do the work.  Faults are connections refused or reset, 5xx
  and silence before the first byte; never a 4xx, never a client that left or reads slowly.  It opens after
  FAULTS_IN_A_ROW, or when FAULTY of the last requests were faults.  After a pause that doubles each time one
  request goes through (half-open), and decides.  Source: Envoy's outlier detection, and its numbers.
* wedged: its engine says that it runs requests and has computed nothing for a while (gateway/watch.py).

The breaker takes at most half of a model's workers, the worst of them; wedged workers may be all but one.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import monotonic

from gateway.errors import TooSlow, Upstream
from router.worker import Worker

log = logging.getLogger(__name__)

FAULTS_IN_A_ROW = 5
FAULTS = frozenset((500, 502, 503, 504))  # not 501: what the worker cannot do, the client should not ask for
WINDOW = 20  # outcomes remembered of a worker that had a fault
ENOUGH = 10  # of them, before their share says anything
FAULTY = 0.5
PAUSE_SECONDS = 5.0  # the first; then twice as long each time,
MAX_PAUSE_SECONDS = 60.0  # and no longer than this
STATES = ("closed", "half_open", "open", "wedged")


class Trial:
    """One request on one worker, and what came of it.  REQUIRES: done() in a `finally`."""

    __slots__ = ("_health", "spoke", "worker")

    def __init__(self, health: "Health", worker: Worker) -> None:
        self._health, self.worker = health, worker
        self.spoke = False  # its first byte is here

    def first_byte(self, status: int) -> None:
        self.spoke = True
        self._health.heard(self.worker.id)
        self._health._outcome(self, fault=status in FAULTS)

    def failed(self, error: Upstream) -> None:
        """A silence in mid-answer says nothing: it may be the client that does not read."""
        if not (self.spoke and isinstance(error, TooSlow)):
            self._health._outcome(self, fault=True)

    def done(self) -> None:
        """Also after a client that left, which decides nothing."""
        self._health._done(self)


@dataclass(slots=True)
class _Row:
    boot_id: str
    outcomes: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))  # True: a fault
    run: int = 0  # faults since the last success
    opened: int = 0  # times, since it was well
    until: float = 0.0  # open: when one request may go through; 0: closed
    probe: Trial | None = None  # that request

    @property
    def bad(self) -> bool:
        enough = len(self.outcomes) >= ENOUGH
        return self.run >= FAULTS_IN_A_ROW or (enough and sum(self.outcomes) >= FAULTY * len(self.outcomes))


class Health:
    """REQUIRES: used from one event loop; `state` may be asked from any thread."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._rows: dict[str, _Row] = {}  # of workers that had a fault lately
        self._heard: dict[str, float] = {}  # of workers with requests: when one was last begun or answered
        self._wedged: set[str] = set()

    def trial(self, worker: Worker) -> Trial:
        """A request goes to this worker now."""
        trial, now = Trial(self, worker), self._clock()
        self._heard.setdefault(worker.id, now)
        row = self._rows.get(worker.id)
        if row is not None and row.until and row.probe is None and now >= row.until:
            row.probe = trial
        return trial

    def out(self, workers: Sequence[Worker]) -> Collection[str]:
        """Of a model's ready workers, those that should get nothing new.  Never all of them."""
        if not self._rows and not self._wedged:
            return ()
        wedged = [worker.id for worker in workers if worker.id in self._wedged][: len(workers) - 1]
        rows = [(self._row(worker), worker.id) for worker in workers if worker.id not in wedged]
        now = self._clock()
        shut = [(row, id_) for row, id_ in rows if row and row.until and (row.probe or now < row.until)]
        shut.sort(key=lambda held: (sum(held[0].outcomes), held[0].run, held[1]), reverse=True)
        most = max(0, len(workers) // 2 - len(wedged))
        return {*wedged, *(id_ for _, id_ in shut[:most])}

    def state(self, worker_id: str) -> str:
        """One of STATES."""
        if worker_id in self._wedged:
            return "wedged"
        row = self._rows.get(worker_id)
        if row is None or not row.until:
            return "closed"
        return "open" if row.probe is None and self._clock() < row.until else "half_open"

    def quiet(self, worker_id: str) -> float:
        """Seconds since a request to this worker was last answered, or begun where none was before."""
        now = self._clock()
        return now - self._heard.get(worker_id, now)

    def heard(self, worker_id: str) -> None:
        """It answered, to whatever question; or nothing was asked."""
        self._heard[worker_id] = self._clock()

    def wedge(self, worker_id: str, wedged: bool) -> None:
        (self._wedged.add if wedged else self._wedged.discard)(worker_id)

    def forget(self, worker_id: str) -> None:
        """It left the fleet."""
        self._rows.pop(worker_id, None)
        self._heard.pop(worker_id, None)
        self._wedged.discard(worker_id)

    def _row(self, worker: Worker) -> _Row | None:
        """Another process under the same name starts anew."""
        row = self._rows.get(worker.id)
        if row is not None and row.boot_id != worker.boot_id:
            del self._rows[worker.id]
            return None
        return row

    def _outcome(self, trial: Trial, fault: bool) -> None:
        worker_id = trial.worker.id
        row = self._rows.get(worker_id)
        if row is None:
            if not fault:
                return
            row = self._rows[worker_id] = _Row(trial.worker.boot_id)
        if row.probe is trial:
            row.probe = None
            if fault:
                self._open(row, worker_id)
            else:
                log.info("worker %s does its work again", worker_id)
                row.until = 0.0
                row.run = 0
                row.outcomes.clear()
            return
        if row.until and not fault:
            return  # sent before it opened: only the one request let through decides
        row.outcomes.append(fault)
        row.run = row.run + 1 if fault else 0
        if not row.until and row.bad:
            self._open(row, worker_id)
        elif len(row.outcomes) == WINDOW and not any(row.outcomes):
            del self._rows[worker_id]

    def _open(self, row: _Row, worker_id: str) -> None:
        pause = min(MAX_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** min(row.opened, 10))
        bad, of = sum(row.outcomes), len(row.outcomes)
        log.warning(
            "worker %s failed %d of its last %d requests; it rests for %g s", worker_id, bad, of, pause
        )
        row.opened += 1
        row.until = self._clock() + pause

    def _done(self, trial: Trial) -> None:
        row = self._rows.get(trial.worker.id)
        if row is not None and row.probe is trial:
            row.probe = None


class RetryBudget:
    """Retries are at most a tenth of the requests, or a fleet in trouble gets a second load on top of the
    first (Site Reliability Engineering, chapter 21).  A reserve, which fills slowly by itself, lets a quiet
    gateway retry too (Finagle's RetryBudget)."""

    SHARE = 0.1  # of a retry, earned by each request
    RESERVE = 10.0  # retries
    PER_SECOND = 0.1

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._left, self._looked = self.RESERVE, clock()

    def earn(self) -> None:
        """A request came."""
        self._left = min(self.RESERVE, self._left + self.SHARE)

    def take(self) -> bool:
        """One retry, if it can be afforded."""
        now = self._clock()
        self._left = min(self.RESERVE, self._left + (now - self._looked) * self.PER_SECOND)
        self._looked = now
        if self._left < 1 - 1e-9:  # ten tenths are one
            return False
        self._left -= 1
        return True
