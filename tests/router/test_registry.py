"""The registry: leases in a real Valkey, /health at a transport that plays the workers."""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from cacheengine import index_orders
from cacheengine.errors import IndexDown
from cacheengine.index_orders import Orders
from cacheengine.index_reader import Fleet
from cacheengine.index_schema import FLEET, WorkerInfo, lease_name
from cacheengine.keys import KeyScheme, namespace_of, probe_keys
from router.probe import Probe
from router.registry import ADAPTERS_SECONDS, Registry, UnknownWorker
from router.sources import STALE_SECONDS, WorkersFile
from router.worker import StaticWorker, Worker
from tests.conftest import ValkeyServer

T = TypeVar("T")
SCHEME = KeyScheme(namespace_of({"model": "m"}), 256)
PROBE = tuple(probe_keys(SCHEME))
A = WorkerInfo("a", "http://a:1", "m", "/m", SCHEME.namespace.hex(), 256, PROBE, boot_id="1", epoch=5)
B = replace(A, worker_id="b", url="http://b:1/")


class House:
    """A registry, the workers it asks for /health, and the clock it looks at."""

    def __init__(self, valkey: ValkeyServer | None, *static: StaticWorker, **more: Any) -> None:
        self.valkey, self.now = valkey, 0.0
        self.sick: set[str] = set()
        self.adapters: dict[str, list[dict[str, str]]] = {}  # by host, as /v1/models has them
        self.asked: list[str] = []
        self.left: list[str] = []
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(transport=httpx.MockTransport(self._health))
        self._fleet = Fleet(valkey.unix_url) if valkey else None
        self._orders = Orders(valkey.unix_url) if valkey else None
        self.registry = Registry(
            self._http,
            self._fleet,
            static,
            clock=lambda: self.now,
            on_leave=self.left.append,
            orders=self._orders,
            **more,
        )

    def _health(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            cards = [{"id": "m", "parent": None}, *self.adapters.get(request.url.host, ())]
            return httpx.Response(200, json={"data": cards})
        assert request.url.path == "/health"
        self.asked.append(request.url.host)
        if request.url.host in self.sick:
            raise httpx.ConnectError("refused")
        if request.url.host + "?" in self.sick:
            raise httpx.ReadTimeout("late")
        return httpx.Response(503 if request.url.host + "!" in self.sick else 200)

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(job)

    def lease(self, *infos: WorkerInfo, **beat: float) -> None:
        assert self.valkey
        with self.valkey.client() as client:
            for info in infos:
                held = info.fields() | {name: str(value) for name, value in beat.items()}
                client.hset(lease_name(info.namespace, info.worker_id), mapping=held)
                client.zadd(FLEET, {f"{info.namespace}:{info.worker_id}": 1})

    def unlease(self, info: WorkerInfo) -> None:
        assert self.valkey
        with self.valkey.client() as client:
            client.delete(lease_name(info.namespace, info.worker_id))

    def look(self) -> str:
        """Refresh; who takes traffic, stale ones in capitals."""
        self.asked.clear()
        self.run(self.registry.refresh())
        return "".join(w.id.upper() if w.stale else w.id for w in self.registry.snapshot())

    def close(self) -> None:
        self.run(self._http.aclose())
        if self._fleet and self._orders:
            self.run(self._fleet.close())
            self.run(self._orders.close())
        self._runner.close()


@pytest.fixture
def house(valkey: ValkeyServer) -> Iterator[House]:
    house = House(valkey)
    yield house
    house.close()


def test_a_worker_takes_traffic_once_its_health_answered(house: House) -> None:
    house.sick = {"a", "b!"}  # refused, and 503
    house.lease(A, B)
    assert house.look() == ""
    house.sick = {"a"}
    assert house.look() == "b"
    house.sick = set()
    assert house.look() == "ab"
    assert house.asked == ["a"]  # a lease speaks for b
    assert house.look() == "ab"
    assert house.asked == []


def test_who_is_late_is_out_while_others_do_its_work_but_a_standstill_empties_no_fleet() -> None:
    house = House(None, StaticWorker("http://a:1", "m"), StaticWorker("http://b:1", "m"))
    try:
        house.sick = {"a?"}  # connected, and no answer in time
        assert house.look() == "b:1"
        house.sick = set()
        assert house.look() == "a:1b:1"
        house.sick = {"a?"}
        assert house.look() == "b:1"
        house.sick = set()
        house.look()
        house.sick = {"a?", "b?"}
        assert house.look() == "a:1b:1"
        house.sick = {"a?", "b"}  # b refuses connections: nobody is there
        assert house.look() == "a:1"
    finally:
        house.close()


def test_a_lease_becomes_a_worker(house: House) -> None:
    house.lease(replace(A, payload_bytes=256 * 1000), prefill_rate=1234.5, bw_host="nonsense", beat_ms=7)
    house.look()
    (worker,) = house.registry.workers_for("m")
    assert (worker.url, worker.epoch, worker.token_bytes) == ("http://a:1", 5, 1000)
    assert (worker.load.prefill_rate, worker.load.bw_host, worker.load.beat_ms) == (1234.5, 0, 7)
    assert worker.scheme == house.registry.scheme("m") == SCHEME
    assert house.registry.workers_for("other") == ()
    assert house.registry.scheme("other") is None
    assert house.registry.models() == ("m",)


def test_a_worker_that_refuses_connections_is_out_until_its_health_answers(house: House) -> None:
    house.lease(A, B)
    house.look()
    house.registry.mark_down("a")
    house.registry.mark_down("nobody")
    assert [worker.id for worker in house.registry.snapshot()] == ["b"]
    house.sick = {"a"}
    assert house.look() == "b"
    house.sick = set()
    assert house.look() == "ab"


def test_without_redis_the_last_known_workers_stay_while_they_are_healthy(house: House) -> None:
    house.lease(A, B)
    assert house.look() == "ab"
    assert house.valkey
    house.valkey.kill()
    assert house.look() == "AB"
    house.sick = {"b"}
    assert house.look() == "A"
    house.sick = set()
    house.valkey.start()  # empty: nobody has beaten yet
    assert house.look() == "AB"
    house.lease(A, B)
    assert house.look() == "ab"
    assert house.left == []


def test_a_worker_whose_lease_is_gone_takes_no_traffic_when_sick_and_is_forgotten_after_a_while(
    house: House,
) -> None:
    house.lease(A, B)
    house.look()
    house.unlease(A)
    house.unlease(B)
    house.sick = {"a", "b"}
    assert house.look() == ""
    assert house.left == []
    house.now += STALE_SECONDS + 1
    assert house.look() == ""
    assert sorted(house.left) == ["a", "b"]
    assert house.registry.describe() == []


def test_a_worker_whose_lease_is_gone_stays_as_long_as_its_health_answers(house: House) -> None:
    """A Redis that is full answers reads and refuses heartbeats: its leases expire."""
    house.lease(A, B)
    assert house.look() == "ab"
    house.unlease(A)
    house.unlease(B)
    for _ in range(3):
        house.now += STALE_SECONDS + 1
        assert house.look() == "AB"
    house.registry.mark_down("a")  # one request that could not connect is not /health
    house.now += STALE_SECONDS + 1
    assert house.look() == "AB"
    house.lease(A)
    house.sick = {"b"}
    assert house.look() == "a"
    house.look()
    assert house.left == ["b"]
    house.unlease(A)
    house.look()
    house.run(house.registry.order("a", "remove"))
    assert house.look() == ""
    assert house.left == ["b", "a"]


def test_a_worker_that_a_source_leaves_out_leaves_however_healthy_it_is() -> None:
    source = Scripted(Worker("a", "http://a:1", "m"))
    source.grace_seconds = STALE_SECONDS
    house = House(None, sources=[source])
    try:
        assert house.look() == "a"
        source.workers = []
        assert house.look() == "A"
        house.now += STALE_SECONDS + 1
        assert house.look() == ""
    finally:
        house.close()


def test_a_worker_that_comes_back_under_another_name_is_not_there_twice(house: House) -> None:
    house.lease(A)
    house.look()
    house.unlease(A)
    house.lease(replace(A, worker_id="z", boot_id="2"))
    assert house.look() == "z"
    assert house.left == ["a"]


def test_a_new_process_under_an_old_name_has_to_prove_itself(house: House) -> None:
    house.lease(A)
    house.look()
    house.sick = {"a"}
    house.lease(replace(A, epoch=6))  # the same process, told the index everything again
    assert house.look() == "a"
    house.lease(replace(A, boot_id="2", epoch=7))  # it beats, but does not listen yet
    assert house.look() == ""


def test_a_worker_that_names_chunks_differently_is_served_but_never_trusted(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.lease(replace(A, probe_keys=("00" * 16,)))
    assert house.look() == "a"
    assert house.registry.scheme("m") is None
    assert "names chunks in another way" in caplog.text


def test_distrust_lasts_until_the_worker_restarts(house: House) -> None:
    house.lease(A)
    house.look()
    house.registry.distrust(house.registry.snapshot()[0])
    assert house.registry.scheme("m") is None
    house.look()
    assert house.registry.scheme("m") is None
    house.lease(replace(A, boot_id="2"))
    house.look()
    assert house.registry.scheme("m") == SCHEME


def test_what_a_process_did_is_not_held_against_the_one_that_took_its_place(house: House) -> None:
    house.lease(A)
    house.look()
    (asked,) = house.registry.snapshot()
    house.lease(replace(A, boot_id="2"))
    house.look()
    house.registry.distrust(asked)  # its answer was still on the way
    house.look()
    assert house.registry.scheme("m") == SCHEME
    house.lease(A)  # two processes of one name
    house.look()
    assert house.registry.scheme("m") is None


def test_the_scheme_is_the_majoritys(house: House) -> None:
    odd = KeyScheme(namespace_of({"model": "other weights"}), 128)
    house.lease(
        replace(A, namespace=odd.namespace.hex(), chunk_tokens=128, probe_keys=tuple(probe_keys(odd))),
        B,
        replace(B, worker_id="c", url="http://c:1"),
    )
    assert house.look() == "abc"
    assert house.registry.scheme("m") == SCHEME


def test_a_lease_that_makes_no_sense_is_left_out(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.lease(replace(A, chunk_tokens=0), replace(B, namespace="beef"), B)
    assert house.look() == "b"
    assert "chunk_tokens=0" in caplog.text


def test_static_workers_are_asked_every_time_and_have_no_scheme() -> None:
    house = House(None, StaticWorker("http://plain:8000/", "m"))
    try:
        assert house.look() == "plain:8000"
        assert house.look() == "plain:8000"
        assert house.asked == ["plain"]
        assert house.registry.scheme("m") is None
        house.sick = {"plain"}
        assert house.look() == ""
        assert [row["state"] for row in house.registry.describe()] == ["down"]
    finally:
        house.close()


def test_a_lease_wins_over_a_static_entry_of_the_same_url(valkey: ValkeyServer) -> None:
    house = House(valkey, StaticWorker("http://a:1", "m"))
    try:
        assert house.look() == "a:1"
        house.lease(A)
        assert house.look() == "a"
    finally:
        house.close()


def test_a_static_worker_is_back_when_its_lease_is_gone(valkey: ValkeyServer) -> None:
    house = House(valkey, StaticWorker("http://a:1", "m"))
    alias = replace(A, worker_id="a:1")  # the same name, as well as the same URL
    try:
        house.lease(alias)
        assert house.look() == "a:1"
        house.unlease(alias)
        assert house.look() == "A:1"
        house.now += STALE_SECONDS + 1
        house.look()
        assert house.look() == "a:1"
        assert [row["source"] for row in house.registry.describe()] == ["static"]
    finally:
        house.close()


def test_it_refreshes_by_itself(house: House) -> None:
    async def until_seen() -> None:
        house.registry._interval = 0  # always due
        running = asyncio.create_task(house.registry.run())
        house.lease(A)
        while not house.registry.snapshot():
            await asyncio.sleep(0.005)
        running.cancel()

    house.run(until_seen())


def test_between_two_looks_it_hears_how_busy_workers_are_and_nothing_else(house: House) -> None:
    house.lease(A)
    house.look()
    house.lease(A, queued_tokens=1000)
    house.lease(B)
    house.run(house.registry.hear())
    (worker,) = house.registry.snapshot()
    assert (worker.id, worker.load.queued_tokens) == ("a", 1000)


def test_what_a_new_process_says_counts_when_it_was_met(house: House) -> None:
    house.lease(A)
    house.look()
    house.lease(replace(A, boot_id="2"), queued_tokens=1000)
    house.run(house.registry.hear())
    (worker,) = house.registry.snapshot()
    assert (worker.boot_id, worker.load.queued_tokens) == ("1", 0)


def test_it_listens_until_the_next_look_is_due(house: House) -> None:
    async def until_heard() -> None:
        running = asyncio.create_task(house.registry.run())  # this clock stands still: no look is ever due
        house.lease(A, queued_tokens=7)
        while house.registry.snapshot()[0].load.queued_tokens != 7:
            await asyncio.sleep(0.005)
        running.cancel()

    house.lease(A)
    house.look()
    house.run(until_heard())


def states(house: House) -> dict[str, str]:
    return {row["id"]: row["state"] for row in house.registry.describe()}


@pytest.fixture
def twin(house: House, valkey: ValkeyServer) -> Iterator[House]:
    """A second gateway of the same fleet."""
    twin = House(valkey)
    yield twin
    twin.close()


def test_a_drained_worker_takes_no_traffic_at_any_gateway_until_it_is_resumed(
    house: House, twin: House
) -> None:
    house.lease(A, B)
    house.look()
    house.run(house.registry.order("a", "drain"))
    assert [worker.id for worker in house.registry.snapshot()] == ["b"]  # at once
    assert twin.look() == "b"
    assert states(house) == states(twin) == {"a": "drained", "b": "ready"}
    house.lease(replace(A, boot_id="2"))
    assert house.look() == "b"  # a restart changes nothing
    twin.run(twin.registry.order("a", "resume"))
    assert twin.look() == house.look() == "ab"
    assert house.left == []


def test_a_removed_worker_is_forgotten_until_it_restarts(house: House, twin: House) -> None:
    house.lease(A, B)
    house.look()
    assert twin.look() == "ab"
    house.run(house.registry.order("a", "remove"))
    assert house.left == ["a"]
    assert house.look() == twin.look() == "b"
    assert states(house) == states(twin) == {"b": "ready"}
    assert twin.left == ["a"]
    house.lease(replace(A, boot_id="2"))
    assert house.look() == twin.look() == "ab"
    house.run(house.registry.order("a", "remove"))
    house.run(house.registry.order("a", "resume"))
    assert house.look() == "ab"


def test_an_order_about_nobody_is_refused(house: House) -> None:
    house.look()
    for what in ("drain", "resume", "remove"):
        with pytest.raises(UnknownWorker):
            house.run(house.registry.order("nobody", what))  # type: ignore[arg-type]


def test_an_order_that_cannot_be_told_to_the_others_is_not_obeyed(house: House, valkey: ValkeyServer) -> None:
    house.lease(A)
    house.look()
    valkey.kill()
    with pytest.raises(IndexDown):
        house.run(house.registry.order("a", "drain"))
    assert house.look() == "A"
    valkey.start()


def test_orders_outlive_a_redis_that_is_away_or_forgets(house: House, twin: House) -> None:
    house.lease(A, B)
    house.look()
    house.run(house.registry.order("a", "drain"))
    assert house.valkey
    house.valkey.kill()
    assert house.look() == "B"
    house.valkey.start()  # empty
    house.lease(A, B)
    assert house.look() == "b"
    assert twin.look() == "b"  # who came later is told too
    house.run(house.registry.order("a", "resume"))
    assert house.look() == twin.look() == "ab"


def test_a_drained_worker_that_only_restarts_stays_drained_and_one_that_never_comes_back_is_forgotten(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_orders, "SWEEP_SECONDS", 0)
    monkeypatch.setattr(index_orders, "KEPT_HOURS", 30)
    house.lease(A, B)
    house.look()
    house.run(house.registry.order("a", "drain"))
    house.run(house.registry.order("b", "remove"))  # and it runs on
    for boot in "23":
        house.unlease(A)
        house.sick = {"a"}
        for _ in range(25):
            house.now += 200
            assert house.look() == ""
        house.sick = set()
        house.lease(replace(A, boot_id=boot))
        assert house.look() == ""
        assert [row["state"] for row in house.registry.describe()] == ["drained"]
    house.unlease(A)
    house.sick = {"a"}
    for _ in range(40):
        house.now += 200
        assert house.look() == ""  # b was seen, though nobody asks it for anything
    house.sick = set()
    house.lease(replace(A, boot_id="4"))
    assert house.look() == "a"


def test_without_redis_orders_are_this_gateways_own() -> None:
    house = House(None, StaticWorker("http://a:1", "m"), StaticWorker("http://b:1", "m"))
    try:
        house.look()
        house.run(house.registry.order("a:1", "drain"))
        assert house.look() == "b:1"
        house.run(house.registry.order("b:1", "remove"))
        assert house.look() == ""
        house.run(house.registry.order("a:1", "resume"))
        house.run(house.registry.order("b:1", "resume"))
        assert house.look() == "a:1b:1"
    finally:
        house.close()


def shares(house: House) -> dict[str, float]:
    house.look()
    return {worker.id: worker.share for worker in house.registry.snapshot()}


def test_a_worker_that_joins_takes_a_rising_share_and_those_that_were_there_take_all(house: House) -> None:
    house.lease(A)
    assert shares(house) == {"a": 1}
    house.sick = {"b"}
    house.lease(B)
    house.look()
    house.now += 1000  # it loads its model
    house.sick = set()
    assert shares(house) == {"a": 1, "b": 0}
    house.now += 15
    assert shares(house) == {"a": 1, "b": 0.5}
    house.sick = {"b"}
    house.registry.mark_down("b")
    house.look()
    house.sick = set()
    house.now += 15
    assert shares(house) == {"a": 1, "b": 1}  # a connection that failed is no new life
    house.lease(replace(A, boot_id="2"))
    assert shares(house) == {"a": 0, "b": 1}


def test_no_warm_up_where_none_is_wanted(valkey: ValkeyServer) -> None:
    house = House(valkey, warmup_seconds=0)
    try:
        house.look()
        house.lease(A)
        assert shares(house) == {"a": 1}
    finally:
        house.close()


def test_an_adapter_is_served_by_those_who_have_it(house: House) -> None:
    house.adapters = {"a": [{"id": "fr", "parent": "m"}], "b": [{"id": "m", "parent": "m"}]}
    house.lease(A, B)
    house.look()
    house.look()
    assert house.registry.models() == ("fr", "m")
    assert [worker.id for worker in house.registry.workers_for("fr")] == ["a"]
    assert [worker.id for worker in house.registry.workers_for("m")] == [
        "a",
        "b",
    ]  # a name of a base is no adapter
    assert house.registry.adapter("fr")
    assert not house.registry.adapter("m")
    assert not house.registry.adapter("nothing")
    assert house.registry.scheme("fr") == SCHEME
    house.adapters["b"] = [{"id": "fr", "parent": "m"}]
    house.look()
    assert len(house.registry.workers_for("fr")) == 1
    house.now += ADAPTERS_SECONDS
    house.look()
    assert len(house.registry.workers_for("fr")) == 2


def test_what_a_file_says_holds_within_a_refresh_and_whom_it_leaves_out_leaves_later(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text("- m=http://a:1\n- m=http://b:1")
    house = House(None, StaticWorker("http://b:1", "m"), sources=[WorkersFile(path)])
    try:
        assert house.look() == "a:1b:1"
        assert [row["source"] for row in house.registry.describe()] == ["file", "static"]
        path.write_text("- m=http://c:1\n- m=http://b:1 ")
        assert house.look() == "A:1b:1c:1"
        house.now += STALE_SECONDS + 1
        assert house.look() == "b:1c:1"
        path.write_text("")
        house.now += STALE_SECONDS + 1
        assert house.look() == "b:1C:1"  # it is being rewritten
        path.write_text("oops")
        assert house.look() == "b:1C:1"
        assert house.left == ["a:1"]
    finally:
        house.close()


def test_an_order_given_while_the_orders_are_read_is_not_forgotten(house: House) -> None:
    house.lease(A, B)
    house.look()
    registry, orders = house.registry, house._orders
    assert orders

    async def meanwhile() -> None:
        read = orders.read

        async def late() -> Any:
            held = await read()
            orders.read = read  # type: ignore[method-assign]
            await registry.order("a", "drain")
            return held

        orders.read = late  # type: ignore[method-assign]
        await registry.refresh()

    house.run(meanwhile())
    assert [worker.id for worker in registry.snapshot()] == ["b"]


class Scripted:
    """A source that does as it is told."""

    name, vouches, grace_seconds = "scripted", False, 0.0

    def __init__(self, *workers: Worker) -> None:
        self.workers, self.trouble = list(workers), ""

    async def read(self) -> list[Worker]:
        if self.trouble:
            raise OverflowError(self.trouble)
        return self.workers


def test_a_source_with_a_bug_stops_nobody_else_and_is_complained_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd, other = Scripted(Worker("a", "http://a:1", "m")), Scripted(Worker("b", "http://b:1", "m"))
    house = House(None, sources=[odd, other])
    try:
        assert house.look() == "ab"
        odd.trouble = "too large"
        other.workers = [Worker("c", "http://c:1", "m")]
        for _ in range(3):
            assert house.look() == "Ac"
        assert caplog.text.count("OverflowError: too large") == 1
        odd.trouble = ""
        assert house.look() == "ac"
    finally:
        house.close()


def test_orders_that_make_no_sense_stop_nobody(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.lease(A, B)
    house.look()
    house.run(house.registry.order("a", "drain"))

    async def nonsense() -> Any:
        raise UnicodeError("no UTF-8")

    assert house._orders
    house._orders.read = nonsense  # type: ignore[method-assign]
    house.lease(replace(A, worker_id="c", url="http://c:1"))
    for _ in range(2):
        assert house.look() == "bc"
    assert caplog.text.count("UnicodeError: no UTF-8") == 1


@pytest.mark.parametrize("url", ["http://c:8O00", "http://c:99999", "http://a..b:80"])
def test_a_worker_whose_address_cannot_be_asked_is_down_alone(url: str) -> None:
    source = Scripted(Worker("bad", url, "m"), Worker("b", "http://127.0.0.1:1", "m"))

    async def look() -> list[str]:
        async with httpx.AsyncClient(trust_env=False) as http:
            registry = Registry(http, sources=[source])
            await registry.refresh()
            await registry._look_for_adapters(registry._known["bad"])
            return [row["state"] for row in registry.describe()]

    assert asyncio.run(look()) == ["down", "down"]


def test_a_worker_that_could_not_be_asked_for_want_of_a_connection_is_as_it_was(house: House) -> None:
    house.lease(A, B)
    house.sick = {"b"}
    assert house.look() == "a"
    house.unlease(A)
    full: list[str] = []

    def no_connection(request: httpx.Request) -> httpx.Response:
        full.append(request.url.host)
        raise httpx.PoolTimeout("full")

    house.registry._probe = Probe(httpx.AsyncClient(transport=httpx.MockTransport(no_connection)))
    assert house.look() == "A"
    assert {"a", "b"} <= set(full)


def test_two_orders_at_once_to_remove_a_worker_remove_it_once(house: House) -> None:
    house.lease(A, B)
    house.look()

    async def both() -> None:
        await asyncio.gather(*(house.registry.order("a", "remove") for _ in range(2)))

    house.run(both())
    assert house.left == ["a"]
    assert [worker.id for worker in house.registry.snapshot()] == ["b"]


def test_an_order_to_remove_a_worker_that_a_refresh_has_removed_meanwhile_is_obeyed(house: House) -> None:
    house.lease(A, B)
    house.look()
    registry, orders = house.registry, house._orders
    assert orders
    give = orders.give

    async def slow(worker_id: str, order: str) -> None:
        await give(worker_id, order)
        await registry.refresh()  # it reads the order before the reply is here

    orders.give = slow  # type: ignore[method-assign]
    house.run(registry.order("a", "remove"))
    assert house.left == ["a"]
    assert [worker.id for worker in registry.snapshot()] == ["b"]
    assert registry.removed() == ["a"]


def test_an_order_to_remove_one_life_does_not_remove_the_next(house: House) -> None:
    house.lease(A)
    house.look()
    registry, orders = house.registry, house._orders
    assert orders
    give = orders.give

    async def slow(worker_id: str, order: str) -> None:
        await give(worker_id, order)
        house.lease(replace(A, boot_id="2"))
        await registry.refresh()

    orders.give = slow  # type: ignore[method-assign]
    house.run(registry.order("a", "remove"))
    assert house.look() == "a"
    assert house.left == []


def test_a_word_in_the_middle_of_a_refresh_takes_no_traffic_from_those_it_is_not_about() -> None:
    """Names change (a lease is gone, the address is known from elsewhere) while somebody is marked down."""
    before = [Worker(id_, f"http://{id_}:1", "m", boot_id="1") for id_ in "abcd"]
    source = Scripted(*before)
    seen: list[str] = []

    async def main() -> None:
        asked, answer = asyncio.Event(), asyncio.Event()
        answer.set()

        async def health(request: httpx.Request) -> httpx.Response:
            asked.set()
            await answer.wait()
            return httpx.Response(200, json={"data": []})

        async with httpx.AsyncClient(transport=httpx.MockTransport(health)) as http:
            registry = Registry(http, sources=[source])

            def look() -> None:
                seen.append(" ".join(worker.id + worker.boot_id for worker in registry.snapshot()))

            await registry.refresh()
            look()
            a, b, c, d = before
            source.workers = [replace(a, boot_id="2"), replace(b, id="z"), c, d]
            asked.clear()
            answer.clear()
            refresh = asyncio.create_task(registry.refresh())
            await asked.wait()
            registry.mark_down("c")
            look()
            await registry.order("d", "drain")
            look()
            await registry.order("d", "resume")
            look()
            answer.set()
            await refresh
            look()

    asyncio.run(main())
    assert seen == ["a1 b1 c1 d1", "a1 b1 d1", "a1 b1", "a1 b1 d1", "a2 c1 d1 z1"]
