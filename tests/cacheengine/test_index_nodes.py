"""The chunk index on a real Cluster: a line and a breaker per node, slots that move, nodes that forget."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from cacheengine.errors import IndexDown
from cacheengine.index_nodes import _drawn, _whole
from cacheengine.index_reader import IndexReader
from cacheengine.index_schema import HOST, Depths, Entry, chunk_name, field_of
from cacheengine.keys import ChunkKey
from tests.cacheengine.index_rig import NS, SCHEME, Loop, Worker, wait_until
from tests.servers import Cluster, Server

FAMILIES = [SCHEME.keys(range(1000 * n, 1000 * n + 16 * 6)) for n in range(12)]


def server_of(cluster: Cluster, keys: list[ChunkKey]) -> Server:
    """As the slots were dealt at the start."""
    return cluster.nodes[key_slot(chunk_name(NS, keys[0], keys[0])) * 3 // 16384]


@pytest.fixture
def index(cluster: Cluster) -> Iterator[Loop]:
    cluster.flush()
    loop = Loop(cluster.url, deadline_ms=2000)
    wait_until(lambda: not any(loop.down(keys) for keys in FAMILIES))
    yield loop
    loop.close()


@pytest.fixture
def worker(cluster: Cluster, index: Loop) -> Iterator[Worker]:
    worker = Worker(cluster.url, lease=0.6)
    for keys in FAMILIES:
        worker.held |= {key: Entry(keys[0], key, HOST) for key in keys}
    worker.writer.start()
    wait_until(lambda: worker.writer.stats.announcements > 0)
    yield worker
    worker.writer.close()
    assert not worker.writer._thread.is_alive()


def whole(index: Loop, worker: Worker, families: list[list[ChunkKey]] = FAMILIES) -> bool:
    return all(
        not index.down(keys) and index.holders(keys).get(worker.name) == Depths(host=6) for keys in families
    )


@pytest.mark.e2e
def test_families_spread_over_a_cluster_and_are_found_there(
    cluster: Cluster, index: Loop, worker: Worker
) -> None:
    assert len({server_of(cluster, keys) for keys in FAMILIES}) == 3
    assert whole(index, worker)
    worker.writer.publish([Entry(FAMILIES[3][0], key, 0) for key in FAMILIES[3][4:]])
    wait_until(lambda: index.holders(FAMILIES[3])[worker.name] == Depths(host=4))
    lease = index.fleet()["w1"]
    assert lease.info.epoch == worker.writer.epoch
    worker.writer.close()
    assert index.fleet() == {}


@pytest.mark.e2e
def test_one_node_that_forgot_is_told_again(cluster: Cluster, index: Loop, worker: Worker) -> None:
    for node in cluster.nodes:
        before = worker.writer.epoch
        with node.client() as client:
            client.flushall()
        wait_until(lambda before=before: worker.writer.epoch > before)  # type: ignore[misc]
        wait_until(lambda: whole(index, worker))


@pytest.mark.e2e
def test_a_frozen_node_costs_only_its_own_families(cluster: Cluster, worker: Worker) -> None:
    index = Loop(cluster.url, deadline_ms=50)
    try:
        wait_until(lambda: whole(index, worker))
        silent = server_of(cluster, FAMILIES[0])
        others = [keys for keys in FAMILIES if server_of(cluster, keys) is not silent]
        with silent.frozen():
            for _ in range(4):
                with pytest.raises(IndexDown):
                    index.holders(FAMILIES[0])
            for keys in others:
                assert index.holders(keys)[worker.name] == Depths(host=6)
        wait_until(lambda: not index.down(FAMILIES[0]))
        wait_until(cluster.whole)
    finally:
        index.close()


@pytest.mark.e2e
def test_an_index_is_open_once_every_family_has_its_server(cluster: Cluster, worker: Worker) -> None:
    silent = server_of(cluster, FAMILIES[0])

    async def main() -> None:
        reader = IndexReader(cluster.url, deadline_ms=2000)
        try:
            with silent.frozen():
                assert not await reader.open(1.0)
                assert not reader.up
                for keys in FAMILIES:
                    if server_of(cluster, keys) is not silent:
                        assert await reader.holders(NS, keys)  # they need not wait for it
            assert await reader.open(30.0)
            for keys in FAMILIES:
                assert await reader.holders(NS, keys)
        finally:
            await reader.close()

    asyncio.run(main())
    wait_until(cluster.whole)


@pytest.mark.parametrize(
    ("ranges", "true"),
    [
        ([(0, 16383)], True),
        ([(0, 99), (100, 16383)], True),
        ([], False),
        ([(0, 99), (101, 16383)], False),
        ([(1, 16383)], False),
        ([(0, 16382)], False),
    ],
)
def test_a_map_with_a_hole_is_not_whole(ranges: list[tuple[int, int]], true: bool) -> None:
    assert _whole([first for first, _ in ranges], [(last, ("h", 1)) for _, last in ranges]) == true


@pytest.fixture
def moving(cluster: Cluster) -> Iterator[Callable[[int, Server, str, Server], None]]:
    """Say where a slot is; at the end everything is where it was."""
    moved: list[tuple[int, Server]] = []

    def ids() -> dict[int, str]:
        found = {}
        for node in cluster.nodes:
            with node.client() as client:
                found[node.port] = client.execute_command("CLUSTER MYID").decode()
        return found

    def move(slot: int, at: Server, what: str, node: Server) -> None:
        with at.client() as client:
            client.execute_command("CLUSTER SETSLOT", slot, what, ids()[node.port])

    def move_and_remember(slot: int, at: Server, what: str, node: Server) -> None:
        moved.append((slot, cluster.nodes[slot * 3 // 16384]))
        move(slot, at, what, node)

    yield move_and_remember
    cluster.flush()
    for slot, home in moved:
        other = next(node for node in cluster.nodes if node is not home)
        with contextlib.suppress(redis.ResponseError):  # it owns the slot
            move(slot, home, "IMPORTING", other)  # so that it bumps its epoch, and stays the owner
        for node in cluster.nodes:
            move(slot, node, "NODE", home)


@pytest.mark.e2e
def test_a_slot_that_moved_is_followed_by_reader_and_writer(
    cluster: Cluster, index: Loop, worker: Worker, moving: Callable[..., None]
) -> None:
    keys = SCHEME.keys(range(77_000, 77_000 + 96))
    slot = key_slot(chunk_name(NS, keys[0], keys[0]))
    home = server_of(cluster, keys)
    other = next(node for node in cluster.nodes if node is not home)
    for node in (other, home, *cluster.nodes):
        moving(slot, node, "NODE", other)
    worker.say(keys, HOST)
    wait_until(lambda: whole(index, worker, [keys]))
    with other.client() as client:
        assert client.exists(chunk_name(NS, keys[0], keys[0]))


@pytest.mark.e2e
def test_a_slot_on_its_way_is_asked_for_where_it_goes(
    cluster: Cluster, index: Loop, moving: Callable[..., None]
) -> None:
    keys = SCHEME.keys(range(88_000, 88_000 + 96))
    name = chunk_name(NS, keys[0], keys[0])
    home = server_of(cluster, keys)
    other = next(node for node in cluster.nodes if node is not home)
    moving(key_slot(name), other, "IMPORTING", home)
    moving(key_slot(name), home, "MIGRATING", other)
    with other.client() as client, client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.execute_command("ASKING")
            pipe.hset(chunk_name(NS, keys[0], key), field_of("w1", 7), 2)
        pipe.execute()
    assert index.holders(keys) == {("w1", 7): Depths(host=6)}
    with other.client() as client, client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.execute_command("ASKING")
            pipe.delete(chunk_name(NS, keys[0], key))
        pipe.execute()


@pytest.mark.parametrize("answer", [None, [], [[1, 2]], [[b"x", 2, [b"h", 1]]], b"OK"])
def test_a_map_that_makes_no_sense_is_no_map(answer: Any) -> None:
    assert _drawn(answer, "h") == []


def test_a_map_is_in_order_and_a_node_that_does_not_know_its_name_has_the_one_it_was_asked_by() -> None:
    answer = [[8192, 16383, [b"b", 2, b"id"], [b"r", 3, b"id"]], [0, 8191, [b"", 1, b"id"]]]
    assert _drawn(answer, "h") == [(0, 8191, ("h", 1)), (8192, 16383, ("b", 2))]
