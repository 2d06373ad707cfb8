"""The router over a real index: gather, decide, write down."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cacheengine.index_reader import Fleet, IndexReader
from cacheengine.index_schema import (
    DEVICE,
    DISK,
    FLEET,
    HOST,
    SHARED,
    WorkerInfo,
    chunk_name,
    field_of,
    lease_name,
)
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of, probe_keys
from router.load import LoadBoard
from router.placement import NoWorker, Placement
from router.policy import replay
from router.registry import Registry
from router.router import Router
from router.worker import StaticWorker
from tests.conftest import ValkeyServer

SCHEME = KeyScheme(namespace_of({"model": "m"}), 256)
TOKENS = 256 * 12 + 100
KEYS = SCHEME.keys(range(TOKENS))
FLEET_IDS = ("a", "b", "c")


def info(worker_id: str, epoch: int = 5) -> WorkerInfo:
    return WorkerInfo(
        worker_id,
        f"http://{worker_id}:1",
        "m",
        "/m",
        SCHEME.namespace.hex(),
        256,
        tuple(probe_keys(SCHEME)),
        payload_bytes=256 * 46_080,
        tiers=("device", "host", "disk", "redis"),
        epoch=epoch,
    )


class House:
    """A router with three workers in the registry and whatever index the test planted."""

    def __init__(self, valkey: ValkeyServer, policy: str = "predicted_ttft", shadow: str = "") -> None:
        self.valkey = valkey
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200)))
        self._fleet = Fleet(valkey.unix_url)
        self._index = IndexReader(valkey.unix_url, deadline_ms=1000)
        registry = Registry(self._http, self._fleet, [StaticWorker("http://plain:1", "plain")])
        self.board, self.heard = LoadBoard(), list[Any]()
        self.router = Router(
            registry, self.board, self._index, policy, on_decision=self.heard.append, shadow=shadow
        )
        with valkey.client() as client:
            for one in map(info, FLEET_IDS):
                beat = {"prefill_rate": "10000", "bw_host": "4e9", "bw_disk": "2e9", "bw_redis": "1e9"}
                client.hset(lease_name(one.namespace, one.worker_id), mapping=one.fields() | beat)
                client.zadd(FLEET, {f"{one.namespace}:{one.worker_id}": 1})
        self._runner.run(registry.refresh())
        self._runner.run(self._index.open())

    def hold(self, worker_id: str, chunks: int, bits: int, epoch: int = 5) -> None:
        with self.valkey.client() as client:
            for key in KEYS[:chunks]:
                client.hset(chunk_name(SCHEME.namespace, KEYS[0], key), field_of(worker_id, epoch), bits)

    def place(self, keys: list[ChunkKey] = KEYS, tokens: int = TOKENS, **more: Any) -> list[Placement]:
        return self._runner.run(self.router.place(more.pop("model", "m"), keys, tokens, **more))

    def close(self) -> None:
        self.board.check()
        for job in (self._index.close(), self._fleet.close(), self._http.aclose()):
            self._runner.run(job)
        self._runner.close()


@pytest.fixture
def house(valkey: ValkeyServer) -> Iterator[House]:
    house = House(valkey)
    yield house
    house.close()


def names(placements: list[Placement]) -> str:
    return "".join(placement.worker.id for placement in placements)


def test_a_request_goes_where_its_prefix_is(house: House) -> None:
    house.hold("c", 9, HOST)
    house.hold("b", 3, DEVICE)
    first, second, third = house.place()
    assert (first.worker.id, second.worker.id, third.worker.id) == ("c", "b", "a")
    assert (first.expected_hit_tokens, first.reason, first.policy) == (9 * 256, "hit", "predicted_ttft")
    assert first.hit_by_tier == {"device": 0, "host": 9 * 256, "disk": 0, "shared": 0}
    assert (second.expected_hit_tokens, third.reason) == (3 * 256, "cold")
    assert first.terms_ms.keys() == {"queue", "transfer", "compute", "interference"}


def test_what_an_earlier_life_held_counts_for_nothing(house: House) -> None:
    house.hold("c", 12, HOST, epoch=4)
    assert {placement.reason for placement in house.place()} == {"cold"}


def test_what_lies_in_redis_is_everybodys(house: House) -> None:
    house.hold("c", 2, HOST)
    house.hold("gone", 10, SHARED, epoch=3)
    by_id = {placement.worker.id: placement.hit_by_tier for placement in house.place()}
    assert [by_id[w]["shared"] for w in "abc"] == [10 * 256, 10 * 256, 8 * 256]
    assert by_id["c"]["host"] == 2 * 256


def test_stretches_of_tiers_do_not_overlap(house: House) -> None:
    house.hold("a", 12, DISK)
    house.hold("a", 5, DISK | HOST)
    house.hold("a", 2, DISK | HOST | DEVICE)
    assert house.place()[0].hit_by_tier == {"device": 512, "host": 768, "disk": 1792, "shared": 0}


def test_a_cold_prompt_goes_the_same_way_every_time(house: House, valkey: ValkeyServer) -> None:
    other = House(valkey)  # a second gateway
    try:
        assert names(house.place()) == names(other.place())
    finally:
        other.close()


def test_what_all_prompts_share_does_not_keep_them_on_one_worker(valkey: ValkeyServer) -> None:
    """The ring's order, which is all there is to go by without the index."""
    house = House(valkey, "prefix_ring")
    talks = [SCHEME.keys([*range(256 * 3), *range(10_000 * n, 10_000 * n + 512)]) for n in range(1, 40)]
    try:
        early = {names(house.place(talk, 256 * 5)) for talk in talks[:7]}
        late = [names(house.place(talk, 256 * 5))[0] for talk in talks[10:]]
        assert len(early) == 1
        assert set(late) == {"a", "b", "c"}
        assert [names(house.place(talk, 256 * 5))[0] for talk in talks[10:]] == late
    finally:
        house.close()


def test_a_session_stays_where_it_is_whatever_it_asks(valkey: ValkeyServer) -> None:
    house = House(valkey, "session")
    try:
        asked = [SCHEME.keys(range(n, n + 512)) for n in range(20)]
        assert len({names(house.place(keys, 512, session=b"me")) for keys in asked}) == 1
        assert len({names(house.place(KEYS, TOKENS, session=b"%d" % n))[0] for n in range(20)}) == 3
        assert len({names(house.place(keys, 512))[0] for keys in asked}) == 3  # no name: by prompt
    finally:
        house.close()


@pytest.mark.parametrize(("policy", "shadow"), [("prefix_ring", "session"), ("session", "prefix_ring")])
def test_a_shadow_does_what_it_would_do_in_earnest(valkey: ValkeyServer, policy: str, shadow: str) -> None:
    house, other = House(valkey, policy, shadow), House(valkey, shadow)
    try:
        differed = set()
        for n in range(20):
            asked, more = SCHEME.keys(range(n, n + 512)), {"tokens": 512, "session": b"%d" % (n % 3)}
            did, would = names(house.place(asked, **more))[0], names(other.place(asked, **more))[0]
            told = house.router.decisions[-1]["shadow"]
            assert (told["worker"], told["differs"]) == (would, did != would)
            differed.add(did != would)
        assert differed == {True, False}
    finally:
        house.close()
        other.close()


def test_a_session_steers_the_ring_where_there_are_no_keys(house: House) -> None:
    orders = {names(house.place([], 50, affinity=b"%d" % n, session=b"me")) for n in range(9)}
    assert len(orders) == 1


def test_equal_prompts_at_once_meet_on_one_worker_before_the_index_knows(house: House) -> None:
    first = house.place()[0]
    assert first.reason == "cold"
    ticket = house.board.start(first.worker.id, TOKENS, first.expected_hit_tokens)
    second = house.place()[0]
    assert second.worker.id == first.worker.id
    assert second.expected_hit_tokens == 12 * 256
    ticket.done()


def test_a_load_elsewhere_outweighs_a_small_hit(house: House) -> None:
    house.hold("c", 1, DEVICE)
    tickets = [house.board.start("c", 3000, 0) for _ in range(2)]
    assert house.place()[0].worker.id != "c"
    for ticket in tickets:
        ticket.done()


def test_who_was_tried_is_not_tried_again(house: House) -> None:
    first = house.place()[0].worker.id
    assert first not in names(house.place(exclude={first}))
    with pytest.raises(NoWorker, match="'m'"):
        house.place(exclude=FLEET_IDS)
    with pytest.raises(NoWorker, match="'unknown'"):
        house.place(model="unknown")


def test_without_redis_the_ring_decides_and_nobody_notices(house: House) -> None:
    ring = names(house.place())
    house.hold("c", 12, HOST)
    house.valkey.kill()
    placements = house.place()
    assert {placement.reason for placement in placements} == {"index_down"}
    assert {placement.policy for placement in placements} == {"prefix_ring"}
    assert names(placements) == ring
    assert house.heard[-1]["index"] == "down"


def test_without_chunk_names_the_text_keeps_its_place_on_the_ring(house: House) -> None:
    orders = [names(house.place([], 50, affinity=f"prompt {i}".encode())) for i in range(20)]
    assert orders == [names(house.place([], 50, affinity=f"prompt {i}".encode())) for i in range(20)]
    assert len({order[0] for order in orders}) == 3
    assert house.heard[-1]["reason"] == "no_keys"


def test_a_plain_worker_is_served_without_any_cache(house: House) -> None:
    assert house.place([], 50, model="plain")[0].expected_hit_tokens == 0


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "power_of_two", "session"])
def test_a_policy_blind_to_the_cache_asks_nobody(valkey: ValkeyServer, policy: str) -> None:
    house = House(valkey, policy)
    try:
        firsts = [house.place()[0].worker.id for _ in range(4)]
        same = firsts[:1] * 4
        assert firsts == {"round_robin": [*"abca"], "power_of_two": firsts}.get(policy, same)
        assert (house.heard[-1]["index"], house.heard[-1]["reason"]) == ("unused", "policy")
    finally:
        house.close()


def test_an_unknown_policy_is_refused(valkey: ValkeyServer) -> None:
    with pytest.raises(KeyError, match="wishful"):
        House(valkey, "wishful")


def test_every_decision_replays_from_its_line(house: House) -> None:
    house.hold("c", 9, HOST)
    for n in range(1, 12):
        house.place(KEYS[:n], 256 * n + 7)
    assert len(house.router.decisions) == len(house.heard) == 11
    for line in house.router.decisions:
        assert replay(json.loads(json.dumps(dict(line)))) == line["order"]
