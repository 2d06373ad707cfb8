"""The shared tier behind real Sentinels: the master is found, lost, and found again elsewhere."""

import time
from typing import Any

import pytest
import redis

from cacheengine.errors import TierDown
from cacheengine.redis_url import client
from tests.cacheengine.tiers.kit import blank, chunks, redis_tier, ref, scripted

pytestmark = pytest.mark.e2e


def eventually(verb: Any, wanted: int) -> None:
    """Call until the tier is up again and answers `wanted`; pytest-timeout bounds it."""
    answer = -1
    while answer != wanted:
        try:
            answer = verb()
        except (TierDown, redis.RedisError):
            time.sleep(0.01)


def test_after_a_master_was_killed_the_new_one_is_used(failing_over: Any):
    refs, data = chunks(4)
    tier = redis_tier(failing_over.url, timeout_ms=500)
    assert tier.write(refs, data) == 4
    with failing_over.master.client() as master:
        assert master.wait(1, 5000) == 1
    failing_over.master.kill()
    with pytest.raises(TierDown):
        tier.write([ref(9)], chunks(1)[1])
    eventually(lambda: tier.prefix(refs), 4)
    into = blank(4)
    assert tier.read(refs, into) == 4
    assert into == data
    eventually(lambda: tier.write([ref(9)], chunks(1)[1]), 1)
    with failing_over.replica.client() as promoted:
        assert promoted.role()[0] == b"master"
        assert promoted.dbsize() == 10
    with client(failing_over.url, socket_timeout=5.0) as other:
        eventually(
            other.dbsize, 10
        )  # redis-py wants the Sentinels to have forgotten the old master's troubles
    tier.close()


def leads(server: redis.Redis) -> bool:
    """A server that is being promoted may hang up on who asks."""
    try:
        return bool(server.role()[0] == b"master")
    except redis.ConnectionError:
        return False


def test_a_master_that_became_a_replica_is_left(failing_over: Any):
    refs, data = chunks(3)
    tier = redis_tier(failing_over.url, timeout_ms=500)
    assert tier.write(refs, data) == 3
    with failing_over.master.client() as master:
        master.wait(1, 5000)
    with redis.Redis.from_url(failing_over.url.split(",")[0].replace("redis-sentinel", "redis")) as sentinel:
        sentinel.sentinel_failover("kv")
    with failing_over.replica.client() as replica:
        while not leads(replica):
            time.sleep(0.02)
    eventually(lambda: tier.write([ref(9)], chunks(1)[1]), 1)
    assert tier.read(refs, blank(3)) == 3
    tier.close()


def test_a_frozen_sentinel_is_passed_over(failing_over: Any):
    refs, data = chunks(2)
    with failing_over.first_sentinel_frozen():
        tier = redis_tier(failing_over.url, timeout_ms=1000)
        assert tier.write(refs, data) == 2
        tier.close()


def test_sentinels_that_do_not_know_the_service_are_tier_down(sentinels: Any):
    tier = redis_tier(sentinels.url.replace("/kv", "/other"))
    with pytest.raises(TierDown, match="does not know service other"):
        tier.prefix([ref(0)])
    tier.close()


@pytest.mark.parametrize("answer", [b"-NOAUTH no\r\n", b"*1\r\n$1\r\nh\r\n", b"*2\r\n$1\r\nh\r\n$1\r\nx\r\n"])
def test_a_sentinel_that_makes_no_sense_is_tier_down(answer: bytes):
    with scripted(answer) as server:
        tier = redis_tier(server.url.replace("redis", "redis-sentinel") + "/kv", timeout_ms=500)
        with pytest.raises(TierDown, match="sentinel"):
            tier.prefix([ref(0)])
        tier.close()
