"""Turns: who may go to the fleet now, and in which order the others follow.

Room: requests under way < seats of the model's ready workers.  A worker has as many seats as its engine runs
requests at once (`max_num_seqs`, which its heartbeat tells) and an eighth more, so that its next step never
waits for us.  What waits here instead of inside vLLM can still be put in order, sent elsewhere, or refused.
Seats are counted per gateway process: several may together send more, which a worker then queues itself.

Order: lower `priority` first.  Within one priority tenants share by weight, in tokens: start-time fair
queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with the prices of virtual token counters (Sheng et al., OSDI
2024): a prompt token costs one when the request gets its turn, a generated one costs two once the answer says
how many there were.  A tenant that was away has saved up nothing.  Within a tenant: order of arrival.

Nobody starves: every eighth turn goes to who has waited longest, whatever the priority, and is charged like
any other.  So a request with n others waiting before it gets one of the next 8 (n + 1) turns.

A full queue is shared like turns are: who has more than others waiting per weight loses the newest of it
(longest queue drop, McKenney, Stochastic Fairness Queueing, 1990).
"""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from gateway.errors import QueueFull, QueueTimeout
from router.worker import Worker

USUAL_SEATS = 1024  # of a worker that does not tell: vLLM's largest default, never to be the narrower door
GENERATED_COST = 2.0  # of a generated token, in prompt tokens
ELDEST_EVERY = 8  # turns
LOOK_SECONDS = 1.0  # between two looks, while somebody waits, whether a worker has joined
_DEPARTURES = 32  # remembered, to tell how fast a queue drains
_MAX_RETRY_AFTER = 60  # seconds
_IDLE_FLOWS = 1024  # tenants remembered beyond those that wait
_IDLE_LANES = 64  # models remembered beyond those in use


class Tenant(Protocol):
    """On whose account a request waits."""

    @property
    def name(self) -> str: ...
    @property
    def priority(self) -> int: ...  # lower is sooner, as vLLM has it
    @property
    def weight(self) -> float: ...  # > 0: a share of turns, beside others of the same priority


@dataclass(slots=True, eq=False)
class _Waiter:
    flow: "_Flow"
    cost: float
    number: int  # of arrival
    came: float
    turn: asyncio.Future[None]


@dataclass(slots=True)
class _Flow:
    """One tenant of one priority in front of one model."""

    tenant: Tenant
    start: float  # virtual time at which its next request begins
    waiting: OrderedDict[int, _Waiter] = field(default_factory=OrderedDict)

    def charge(self, cost: float) -> None:
        self.start += cost / self.tenant.weight


_Name = tuple[int, str]  # priority and tenant's name: keys of one tenant may differ in priority


@dataclass(slots=True)
class _Lane:
    """One model: what is under way, and who waits for it."""

    model: str
    workers: Sequence[Worker] = ()  # `seats` are theirs
    seats: int = 0
    open: int = 0
    depth: int = 0
    now: float = 0.0  # virtual time: the start of the last request that got its turn by its tag
    served: int = 0
    flows: dict[_Name, _Flow] = field(default_factory=dict)
    departures: deque[float] = field(default_factory=lambda: deque(maxlen=_DEPARTURES))

    def add(self, waiter: _Waiter) -> None:
        waiter.flow.waiting[waiter.number] = waiter
        self.depth += 1

    def remove(self, waiter: _Waiter) -> None:
        if waiter.flow.waiting.pop(waiter.number, None) is not None:
            self.depth -= 1
        if not self.depth:  # the busy period is over, and with it everybody's account
            self.flows.clear()
            self.departures.clear()
            self.now = 0.0

    def waiting(self, tenant: Tenant) -> int:
        flow = self.flows.get((tenant.priority, tenant.name))
        return len(flow.waiting) if flow else 0

    def flow(self, tenant: Tenant) -> _Flow:
        """An account to wait on.  One that was away has saved up nothing."""
        name = tenant.priority, tenant.name
        flow = self.flows.get(name)
        if flow is None:
            if len(self.flows) > self.depth + _IDLE_FLOWS:
                self.flows = {n: f for n, f in self.flows.items() if f.waiting or f.start > self.now}
            flow = self.flows[name] = _Flow(tenant, self.now)
        if not flow.waiting:
            flow.start = max(flow.start, self.now)
        return flow

    def next(self) -> _Waiter:
        """REQUIRES: somebody waits."""
        self.served += 1
        waiting = [flow for flow in self.flows.values() if flow.waiting]
        if self.served % ELDEST_EVERY == 0:
            chosen = min(waiting, key=lambda flow: next(iter(flow.waiting)))
        else:
            chosen = min(
                waiting, key=lambda flow: (flow.tenant.priority, flow.start, next(iter(flow.waiting)))
            )
            self.now = max(self.now, chosen.start)
        return next(iter(chosen.waiting.values()))


class Turn:
    """A place among the requests under way.  REQUIRES: done() in a `finally`; it is idempotent."""

    __slots__ = ("_lane", "_open", "_tenant", "_turns", "waited")

    def __init__(self, turns: "Turns", lane: _Lane, tenant: Tenant, waited: float) -> None:
        self._turns, self._lane, self._tenant, self._open = turns, lane, tenant, True
        self.waited = waited  # seconds

    def done(self, generated: int = 0) -> None:
        """The request has ended, and its answer had so many tokens."""
        if self._open:
            self._open = False
            self._turns._ended(self._lane, self._tenant, generated)


class Turns:
    """REQUIRES: used from one event loop.

    `workers_for` names a model's ready workers, `waited` hears the seconds of each wait that ended in a turn,
    `refused` the reason of each that did not: queue_full or queue_timeout."""

    def __init__(
        self,
        workers_for: Callable[[str], Sequence[Worker]],
        max_queue: int,
        timeout: float,
        seats: int = 0,
        clock: Callable[[], float] = monotonic,
        waited: Callable[[float], None] = lambda seconds: None,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`seats` of every worker, whatever it tells; 0: what it tells.  `timeout` in seconds."""
        self._workers_for, self._max_queue, self._timeout = workers_for, max_queue, timeout
        self._seats, self._clock, self._waited, self._refused = seats, clock, waited, refused
        self._lanes: dict[str, _Lane] = {}
        self._arrivals = 0
        self._timer: asyncio.TimerHandle | None = None
        self.depth = 0  # requests that wait now

    async def take(self, model: str, tenant: Tenant, tokens: int) -> Turn:
        """At once where there is room and nobody waits, else in turn.  `tokens` of the prompt.  Raises
        QueueFull and QueueTimeout; a caller that is cancelled leaves the queue."""
        lane = self._lane(model)
        if lane.depth or lane.open >= lane.seats:
            return Turn(self, lane, tenant, await self._wait(lane, tenant, tokens))
        lane.open += 1
        return Turn(self, lane, tenant, 0.0)

    def retry_after(self, lane: _Lane) -> int:
        """Whole seconds until a queue this long has drained, as fast as it did lately; at least 1."""
        gone = lane.departures
        if len(gone) < 2 or not lane.depth:
            return 1
        seconds = lane.depth * (self._clock() - gone[0]) / (len(gone) - 1)
        return max(1, min(_MAX_RETRY_AFTER, math.ceil(seconds)))

    def check(self) -> None:
        """The books agree."""
        assert self.depth == sum(lane.depth for lane in self._lanes.values()) <= self._max_queue
        for lane in self._lanes.values():
            assert lane.depth == sum(len(flow.waiting) for flow in lane.flows.values())
            assert lane.open >= 0

    async def _wait(self, lane: _Lane, tenant: Tenant, tokens: int) -> float:
        if self.depth >= self._max_queue and not self._push_out(lane.waiting(tenant) + 1, tenant.weight):
            self._refused("queue_full")
            raise QueueFull(self.retry_after(lane))
        flow = lane.flow(tenant)
        self._arrivals += 1
        future = asyncio.get_running_loop().create_future()
        waiter = _Waiter(flow, float(max(1, tokens)), self._arrivals, self._clock(), future)
        lane.add(waiter)
        self.depth += 1
        self._watch()
        try:
            async with asyncio.timeout(self._timeout):
                await future
        except TimeoutError:
            if not _granted(future):
                self._refused("queue_timeout")
                raise QueueTimeout(self._timeout, self.retry_after(lane)) from None
        except asyncio.CancelledError:
            if _granted(future):  # in the same moment: somebody else may have it
                self._ended(lane, tenant, 0)
            raise
        finally:
            if waiter.number in flow.waiting:
                self._leave(lane, waiter)
        self._waited(waited := self._clock() - waiter.came)
        return waited

    def _push_out(self, waiting: int, weight: float) -> bool:
        """Make a place where somebody has more waiting than the newcomer would have, for their weights."""
        queues = [
            (lane, flow) for lane in self._lanes.values() for flow in lane.flows.values() if flow.waiting
        ]
        if not queues:
            return False
        lane, longest = max(queues, key=lambda held: len(held[1].waiting) / held[1].tenant.weight)
        if waiting / weight >= len(longest.waiting) / longest.tenant.weight:
            return False
        newest = next(reversed(longest.waiting.values()))
        if not newest.turn.cancelled():  # else it has just given up, and has not run since
            newest.turn.set_exception(QueueFull(self.retry_after(lane)))
            self._refused("queue_full")
        self._leave(lane, newest)
        return True

    def _leave(self, lane: _Lane, waiter: _Waiter) -> None:
        lane.remove(waiter)
        self.depth -= 1

    def _ended(self, lane: _Lane, tenant: Tenant, generated: int) -> None:
        lane.open -= 1
        if lane.depth:
            if generated and (flow := lane.flows.get((tenant.priority, tenant.name))) is not None:
                flow.charge(GENERATED_COST * generated)
            lane.departures.append(self._clock())
            self._serve(lane)

    def _serve(self, lane: _Lane) -> None:
        self._count_seats(lane, self._workers_for(lane.model))
        while lane.depth and lane.open < lane.seats:
            waiter = lane.next()
            if not waiter.turn.cancelled():  # else it has just given up, and has not run since
                waiter.flow.charge(waiter.cost)
                lane.open += 1
                waiter.turn.set_result(None)
            self._leave(lane, waiter)

    def _lane(self, model: str) -> _Lane:
        workers = self._workers_for(model)
        if workers and workers[0].model != model:  # an adapter runs in its base model's seats
            model = workers[0].model
            workers = self._workers_for(model)
        lane = self._lanes.get(model)
        if lane is None:
            if len(self._lanes) >= _IDLE_LANES:
                self._lanes = {name: lane for name, lane in self._lanes.items() if lane.open or lane.depth}
            lane = self._lanes[model] = _Lane(model)
        if workers is not lane.workers:
            self._count_seats(lane, workers)
        return lane

    def _count_seats(self, lane: _Lane, workers: Sequence[Worker]) -> None:
        lane.workers = workers
        lane.seats = sum(self._seats or _seats(worker) for worker in workers)

    def _watch(self) -> None:
        """While somebody waits, a worker may join, or come back: nobody tells us."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        for lane in self._lanes.values():
            if lane.depth:
                self._serve(lane)
        if self.depth:
            self._watch()


def _granted(future: asyncio.Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _seats(worker: Worker) -> int:
    told = int(worker.load.max_num_seqs)
    return told + -(-told // 8) if told else USUAL_SEATS
