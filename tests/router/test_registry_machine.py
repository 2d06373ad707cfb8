"""The registry against whatever its sources, workers and operators do."""

import asyncio

import httpx
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from router.registry import Registry
from router.sources import STALE_SECONDS, SourceDown
from router.worker import Worker

HOSTS = [*"abcd"]
HOST = st.sampled_from(HOSTS)
PLACE = st.integers(0, 2)


class Told:
    """A source that names whom it is told to."""

    def __init__(self, name: str, vouches: bool, grace_seconds: float) -> None:
        self.name, self.vouches, self.grace_seconds = name, vouches, grace_seconds
        self.up = True
        self.workers: dict[str, Worker] = {}

    async def read(self) -> list[Worker]:
        if not self.up:
            raise SourceDown(self.name)
        return list(self.workers.values())


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now, self.boots = 0.0, 0
        self.sick: set[str] = set()
        self.left: list[str] = []
        self.drained: set[str] = set()
        self.removed: set[tuple[str, str]] = set()  # id, boot id
        self.sources = [
            Told("lease", True, STALE_SECONDS),
            Told("file", False, 0.0),
            Told("dns", False, 10.0),
        ]
        self.runner = asyncio.Runner()
        self.http = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        self.registry = Registry(
            self.http, clock=lambda: self.now, on_leave=self.left.append, sources=self.sources
        )

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.host in self.sick:
            raise httpx.ConnectError("refused")
        return httpx.Response(200)

    @rule(place=PLACE, host=HOST, by_name=st.booleans())
    def name(self, place: int, host: str, by_name: bool) -> None:
        """A lease may call a worker by a name, or by the address the others know it by."""
        self.boots += 1
        worker_id = f"the {host}" if by_name and place == 0 else host
        boot_id = str(self.boots) if place == 0 else ""
        self.sources[place].workers[host] = Worker(worker_id, f"http://{host}:1", "m", boot_id=boot_id)

    @rule(place=PLACE, host=HOST)
    def drop(self, place: int, host: str) -> None:
        self.sources[place].workers.pop(host, None)

    @rule(place=PLACE)
    def toggle(self, place: int) -> None:
        self.sources[place].up ^= True

    @rule(host=HOST)
    def sicken_or_heal(self, host: str) -> None:
        self.sick ^= {host}

    @rule(seconds=st.sampled_from([1, 6, 11]))
    def refresh(self, seconds: int) -> None:
        self.now += seconds
        self.runner.run(self.registry.refresh())

    @rule(host=HOST)
    def mark_down(self, host: str) -> None:
        self.registry.mark_down(host)

    @rule(what=st.sampled_from(["drain", "resume", "remove"]), at=st.integers(0, 7))
    def order(self, what: str, at: int) -> None:
        known = [row["id"] for row in self.registry.describe()] + self.registry.removed()
        if not known:
            return
        worker_id = known[at % len(known)]
        if (worker := self.registry.find(worker_id)) is None:
            what = "resume"
        self.runner.run(self.registry.order(worker_id, what))  # type: ignore[arg-type]
        self.drained.discard(worker_id)
        self.removed = {pair for pair in self.removed if pair[0] != worker_id}
        if what == "drain":
            self.drained.add(worker_id)
        if what == "remove" and worker is not None:
            self.removed.add((worker_id, worker.boot_id))

    @rule()
    def in_the_end_it_is_as_the_first_source_says(self) -> None:
        """Once everything answers, whom nobody names any more is really gone, and every grace is over."""
        for source in self.sources:
            source.up = True
        self.sick = set(HOSTS).difference(*(source.workers for source in self.sources))
        for _ in range(3):
            self.refresh(11)
        expected: dict[str, Worker] = {}
        for source in self.sources:
            for worker in source.workers.values():
                taken = {held.url for held in expected.values() if held not in source.workers.values()}
                gone = (worker.id, worker.boot_id) in self.removed
                if worker.id not in expected and worker.url not in taken and not gone:
                    expected[worker.id] = worker
        assert {row["id"] for row in self.registry.describe()} == set(expected)
        ready = {worker.id: worker.boot_id for worker in self.registry.snapshot()}
        assert ready == {w.id: w.boot_id for w in expected.values() if w.id not in self.drained}
        assert not any(worker.stale for worker in self.registry.snapshot())

    @invariant()
    def nobody_gets_traffic_twice_or_against_orders(self) -> None:
        if not hasattr(self, "registry"):
            return
        ready = self.registry.snapshot()
        assert len({worker.url for worker in ready}) == len(ready)
        assert not {worker.id for worker in ready} & self.drained
        assert not {(worker.id, worker.boot_id) for worker in ready} & self.removed
        assert self.registry.workers_for("m") == ready
        known = {row["id"] for row in self.registry.describe()}
        assert {worker.id for worker in ready} <= known

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.http.aclose())
            self.runner.close()


def test_whatever_happens_the_registry_converges_and_nobody_is_sent_traffic_against_orders() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine, settings=settings(max_examples=200, stateful_step_count=30, deadline=None)
    )
