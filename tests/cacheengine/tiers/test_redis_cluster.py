"""The shared tier on a real Cluster of three masters: spread keys, redirects, a map that goes out of date."""

from collections.abc import Iterator
from typing import Any

import pytest
from redis.crc import key_slot

from cacheengine.errors import TierDown
from cacheengine.tiers.redis import RedisTier
from cacheengine.tiers.resp import Command, Connection
from tests.cacheengine.tiers.kit import blank, chunks, key, redis_tier, ref, scripted, unlink
from tests.servers import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def tier(cluster: Any) -> Iterator[RedisTier]:
    cluster.flush()
    made = redis_tier(cluster.url, connections=1)
    yield made
    made.close()


def names(n: int) -> list[str]:
    return [f"org/model@1@0@{key(n).hex()}{tail}" for tail in ("", "_bytes")]


def node_of(cluster: Any, name: str) -> int:
    return next(i for i in range(3) if key_slot(name.encode()) < 16384 * (i + 1) // 3)


class Migration:
    """One slot on its way from its node to the next one, step by step."""

    def __init__(self, cluster: Any, name: str) -> None:
        self.slot = key_slot(name.encode())
        self.source = cluster.nodes[node_of(cluster, name)]
        self.target = cluster.nodes[(node_of(cluster, name) + 1) % 3]
        self.all = cluster.nodes

    def setslot(self, node: Any, what: str, other: Any = None) -> None:
        with node.client() as client:
            ids = [client.execute_command("CLUSTER MYID").decode()] if other is None else []
            if other is not None:
                with other.client() as theirs:
                    ids = [theirs.execute_command("CLUSTER MYID").decode()]
            client.execute_command("CLUSTER SETSLOT", self.slot, what, *ids)

    def begin(self) -> None:
        self.setslot(self.target, "IMPORTING", self.source)
        self.setslot(self.source, "MIGRATING", self.target)

    def move(self, name: str) -> None:
        with self.source.client() as client:
            client.migrate("127.0.0.1", self.target.port, name, 0, 5000)

    def finish(self, owner: Any) -> None:
        for node in self.all:
            self.setslot(node, "NODE", owner)

    def back(self) -> None:
        """As before, and empty, for the next test.

        A node that takes over a slot which it imports bumps its epoch, and so wins against what the others
        still gossip; one that is merely told that it owns the slot may lose it again.
        """
        for node in self.all:
            with node.client() as client:
                client.flushall()
        if not self.owns(self.source):
            self.setslot(self.source, "IMPORTING", self.target)
        self.finish(self.source)
        until(lambda: all(self.knows(node, self.source) for node in self.all), "the slot's way back")

    def owns(self, node: Any) -> bool:
        return self.knows(node, node)

    def knows(self, node: Any, owner: Any) -> bool:
        """Whether this node says that the slot is the owner's."""
        with node.client() as client:
            ranges = client.execute_command("CLUSTER SLOTS")
        return any(first <= self.slot <= last and at[1] == owner.port for first, last, at, *_ in ranges)


def test_slots_are_the_ones_the_server_counts(cluster: Any):
    with cluster.nodes[0].client() as client:
        for name in ("a", "org/model@1@0@00_bytes", "a{b}c", "a{}c", "{x", "m{{a}}b", "x}{y}", ""):
            assert key_slot(name.encode()) == client.execute_command("CLUSTER KEYSLOT", name)


def test_the_two_keys_of_a_chunk_may_live_on_two_nodes(tier: RedisTier, cluster: Any):
    refs, data = chunks(30)
    into = blank(30)
    assert tier.write(refs, data) == 30
    homes = [tuple(node_of(cluster, name) for name in names(n)) for n in range(30)]
    assert {len(set(pair)) for pair in homes} == {1, 2}
    for n, pair in enumerate(homes):
        for name, home in zip(names(n), pair, strict=True):
            with cluster.nodes[home].client() as client:
                assert 0 < client.ttl(name) <= 60
    assert tier.prefix(refs) == 30
    assert tier.read(refs, into) == 30
    assert into == data


def test_a_prefix_costs_one_round_trip_to_each_node(tier: RedisTier, monkeypatch: pytest.MonkeyPatch):
    refs, data = chunks(60)
    tier.write(refs, data)
    pieces: list[int] = []
    send = Connection.send

    def counted(conn: Connection, *commands: Command) -> None:
        pieces.append(len(commands))
        send(conn, *commands)

    monkeypatch.setattr(Connection, "send", counted)
    assert tier.prefix(refs) == 60
    assert (len(pieces), sum(pieces)) == (3, 120)


def test_a_slot_that_moved_is_followed(tier: RedisTier, cluster: Any):
    refs, data = chunks(8)
    tier.write(refs, data)
    name = names(3)[1]
    move = Migration(cluster, name)
    move.begin()
    move.move(name)
    move.finish(move.target)
    into = blank(8)
    assert tier.read(refs, into) == 8
    assert into == data
    assert tier.prefix(refs) == 8
    unlink(tier, refs)
    assert tier.prefix(refs) == 0
    assert tier.write(refs, data) == 8
    assert tier.stats.errors == 0
    move.back()


@pytest.mark.parametrize("moved", [False, True])
def test_a_slot_on_its_way_is_asked_at_both_ends(tier: RedisTier, cluster: Any, moved: bool):
    refs, data = chunks(8)
    tier.write(refs, data)
    name = names(3)[1]
    move = Migration(cluster, name)
    move.begin()
    if moved:
        move.move(name)
    into = blank(8)
    assert tier.prefix(refs) == 8
    assert tier.read(refs, into) == 8
    assert into == data
    unlink(tier, refs[3:4])
    assert tier.write(refs, data) == 8  # the chunk comes into being at the other end
    with move.target.client() as client:
        assert client.execute_command("CLUSTER COUNTKEYSINSLOT", move.slot) == 1
    assert tier.read(refs, blank(8)) == 8
    assert tier.stats.errors == 0
    move.back()


def test_a_frozen_node_costs_what_it_has_and_is_found_again(cluster: Any):
    cluster.flush()
    refs, data = chunks(30)
    tier = redis_tier(cluster.url, timeout_ms=400, connections=1)
    assert tier.write(refs, data) == 30
    home = node_of(cluster, names(5)[1])
    first = next(n for n in range(30) if node_of(cluster, names(n)[1]) == home)
    with cluster.nodes[home].frozen():
        into = blank(30)
        if first:
            assert tier.read(refs, into) <= first
        with pytest.raises(TierDown):
            tier.read(refs[first:], into)
        with pytest.raises(TierDown):
            tier.prefix(refs)
    from_now = 0
    while from_now < 30:  # the Cluster may take a moment to trust the node again
        try:
            from_now = tier.prefix(refs)
        except TierDown:
            continue
    into = blank(30)
    assert tier.read(refs, into) == 30
    assert into == data
    tier.close()


def test_any_seed_that_answers_is_enough(cluster: Any):
    cluster.flush()
    tier = redis_tier(cluster.url.replace("//", "//127.0.0.1:1,"))
    assert tier.write(*chunks(4)) == 4
    tier.close()


def test_a_server_that_is_no_cluster_is_down_and_says_why(valkey: Any):
    tier = redis_tier(f"redis-cluster://127.0.0.1:{valkey.port}")
    with pytest.raises(TierDown, match="cluster support disabled"):
        tier.prefix([ref(0)])
    tier.close()


def test_a_single_url_of_a_cluster_node_is_down_and_says_why(cluster: Any):
    tier = redis_tier(cluster.nodes[0].url)
    with pytest.raises(TierDown, match="MOVED"):
        [tier.read([ref(n)], blank(1)) for n in range(30)]
    tier.close()


def test_a_cluster_that_is_down_is_tier_down(tier: RedisTier, cluster: Any):
    refs, data = chunks(4)
    tier.write(refs, data)
    slot = key_slot(names(0)[1].encode())
    node = cluster.nodes[node_of(cluster, names(0)[1])]
    with node.client() as client:
        client.execute_command("CLUSTER DELSLOTS", slot)
        try:
            with pytest.raises(TierDown, match=r"CLUSTERDOWN|serves slot"):
                for_ever(lambda: tier.read(refs, blank(4)))
        finally:
            client.execute_command("CLUSTER ADDSLOTS", slot)
    while down(tier):
        pass
    assert tier.write(refs, data) == 4


def for_ever(verb: Any) -> None:
    """Until it raises; pytest-timeout bounds it."""
    while True:
        verb()


def down(tier: RedisTier) -> bool:
    try:
        tier.prefix([ref(0)])
    except TierDown:
        return True
    return False


@pytest.mark.parametrize(
    "slots",
    [
        b"*0\r\n",
        b"*1\r\n*3\r\n:0\r\n:99999\r\n*2\r\n$1\r\nh\r\n:1\r\n",
        b"+OK\r\n",
        b"-NOPERM no\r\n",
        b"$-1\r\n",
    ],
)
def test_a_map_that_makes_no_sense_is_tier_down(slots: bytes):
    with scripted(slots) as server:
        tier = redis_tier(server.url.replace("redis", "redis-cluster"), timeout_ms=500)
        with pytest.raises(TierDown):
            tier.prefix([ref(0)])
        tier.close()
