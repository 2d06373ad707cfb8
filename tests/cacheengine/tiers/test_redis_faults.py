"""The shared tier against a real Valkey: every way a server can fail."""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from cacheengine.config import ConfigError
from cacheengine.errors import TierDown
from cacheengine.frame import HEADER_BYTES, pack
from cacheengine.tiers.redis import RedisTier
from tests.cacheengine.tiers.kit import (
    NAMESPACE,
    PAYLOAD,
    TOKENS,
    ScriptedServer,
    blank,
    buffer,
    chunks,
    payload,
    redis_tier,
    ref,
    scripted,
)

pytestmark = pytest.mark.e2e


@pytest.fixture
def tier(valkey: Any) -> Iterator[RedisTier]:
    made = redis_tier(valkey.unix_url, connections=1)
    yield made
    made.close()


def reconnects(admin: redis.Redis) -> int:
    return int(admin.info("stats")["total_connections_received"])


@contextmanager
def configured(admin: redis.Redis, name: str, value: str) -> Iterator[None]:
    before = admin.config_get(name)[name]
    admin.config_set(name, value)
    try:
        yield
    finally:
        admin.config_set(name, before)


def test_a_full_server_keeps_fewer_and_the_connection_stays_in_step(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(8)
    tier.write(refs[:2], payloads[:2])
    before = reconnects(admin)
    with configured(admin, "maxmemory", "1"):
        assert tier.write(refs, payloads) == 2
        assert tier.write(refs[4:], payloads[4:]) == 0
        assert tier.read(refs, blank(8)) == 2
    assert tier.write(refs, payloads) == 8
    into = blank(8)
    assert tier.read(refs, into) == 8
    assert into == payloads
    assert reconnects(admin) == before


def test_a_replica_can_be_read_and_refuses_writes(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(4)
    tier.write(refs[:2], payloads[:2])
    admin.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(TierDown, match="READONLY"):
            tier.write(refs[2:], payloads[2:])
        assert tier.read(refs, blank(4)) == 2
    finally:
        admin.replicaof("NO", "ONE")
    assert tier.write(refs, payloads) == 4


@pytest.mark.parametrize(
    "refusal", [b"-LOADING busy\r\n", b"-MOVED 1 127.0.0.1:2\r\n", b"-NOPERM no\r\n", b"-MASTERDOWN no\r\n"]
)
def test_a_server_that_refuses_is_down(refusal: bytes):
    with scripted(*[refusal * 10] * 3) as server:
        tier = redis_tier(server.url)
        for verb in (lambda: tier.prefix([ref(0)]), lambda: tier.read([ref(0)], blank(1))):
            with pytest.raises(TierDown, match=refusal.split()[0].decode()[1:]):
                verb()
        with pytest.raises(TierDown, match=refusal.split()[0].decode()[1:]):
            tier.write(*chunks(1))
        assert tier.stats.errors == 3
        tier.close()


@pytest.mark.parametrize(
    "script",
    [
        ScriptedServer.hangup,
        b"$%d\r\nabc" % (HEADER_BYTES + PAYLOAD) + ScriptedServer.hangup,
        b"$%d\r\nabc" % (HEADER_BYTES + PAYLOAD),
        b"$%d" % (HEADER_BYTES + PAYLOAD),
        b"$3\r\nabcde",
        b"$9999999999999\r\n",
        b"$x\r\n",
        b":1\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"x" * 20_000,
        b"",
    ],
    ids=lambda script: repr(script[:24]),
)
def test_a_broken_conversation_is_down_and_starts_anew(script: bytes, valkey: Any):
    with scripted(script, b"$-1\r\n:0\r\n:0\r\n") as server:
        tier = redis_tier(server.url, timeout_ms=300)
        with pytest.raises(TierDown):
            tier.read([ref(0)], blank(1))
        assert tier.read([ref(0)], blank(1)) == 0  # on a new connection
        tier.close()


def test_a_frozen_server_is_down_and_its_late_replies_are_never_taken_for_others(valkey: Any):
    tier = redis_tier(valkey.url, timeout_ms=300, connections=1)
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    with valkey.frozen():
        for verb in (lambda: tier.prefix(refs), lambda: tier.read(refs, blank(6))):
            with pytest.raises(TierDown, match="timed out"):
                verb()
    into = blank(2)
    assert tier.read(refs[4:], into) == 2
    assert into == payloads[4:]
    tier.close()


def test_a_reply_that_comes_after_its_deadline_is_not_waited_for_nor_believed(valkey: Any):
    size = 4 << 20
    tier = redis_tier(valkey.url, payload_bytes=size, timeout_ms=200, connections=1)
    payloads = [payload(n, size) for n in range(3)]
    assert tier.write([ref(n) for n in range(3)], payloads) == 3
    into = buffer(size)
    for _ in range(3):
        with valkey.frozen(), pytest.raises(TierDown):
            tier.read([ref(0)], [into])
        assert tier.read([ref(2)], [into]) == 1
        assert into == payloads[2]
    tier.close()


def test_a_paused_server_is_down_until_it_goes_on(valkey: Any, admin: redis.Redis):
    tier = redis_tier(valkey.unix_url, timeout_ms=300, connections=1)
    refs, payloads = chunks(2)
    tier.write(refs, payloads)
    admin.client_pause(60_000, all=False)  # writes wait
    with pytest.raises(TierDown, match="timed out"):
        tier.write([ref(5)], [payload(5)])
    assert tier.read(refs, blank(2)) == 2
    admin.client_unpause()
    assert tier.write([ref(5)], [payload(5)]) == 1
    tier.close()


def framed(n: int) -> bytes:
    header = pack(NAMESPACE, ref(n).key, ref(n).parent, ref(n).root, payload(n), TOKENS, 0, 1)
    return b"$%d\r\n%s\r\n" % (HEADER_BYTES + PAYLOAD, header + payload(n))


@pytest.mark.parametrize(
    "end", [ScriptedServer.hangup, b"$9", b"-ERR broken\r\n" * 9, b"?\r\n", framed(2)[:5000]]
)
def test_what_was_filled_before_the_trouble_is_kept(end: bytes):
    with scripted(framed(0) + framed(1) + end) as server:
        tier = redis_tier(server.url, timeout_ms=300)
        into = blank(4)
        assert tier.read([ref(n) for n in range(4)], into) == 2
        assert into[:2] == [payload(0), payload(1)]
        assert (tier.stats.hits, tier.stats.misses, tier.stats.errors) == (2, 1, 1)
        tier.close()


def test_chunks_that_were_read_count_although_nothing_renews_them(valkey: Any, admin: redis.Redis):
    tier = redis_tier(valkey.url, timeout_ms=200, connections=1)
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    admin.client_pause(60_000, all=False)  # writes wait, EXPIRE among them
    into = blank(6)
    assert tier.read(refs, into) == 6
    assert into == payloads
    assert (tier.stats.hits, tier.stats.misses, tier.stats.errors) == (6, 0, 1)
    admin.client_unpause()
    assert tier.read(refs, into) == 6
    tier.close()


def test_under_real_memory_pressure_nothing_is_wrong_and_the_look_up_is_honest(
    tier: RedisTier, admin: redis.Redis
):
    rng = random.Random(1)
    used = admin.info("memory")["used_memory"]
    with (
        configured(admin, "maxmemory-policy", "allkeys-lru"),
        configured(admin, "maxmemory", str(used + 40 * PAYLOAD)),
    ):
        for _ in range(60):
            first = rng.randrange(100)
            refs = [ref(n) for n in range(first, first + 8)]
            assert tier.write(refs, [payload(n) for n in range(first, first + 8)]) <= 8
            into = blank(8)
            seen, got = tier.prefix(refs), tier.read(refs, into)
            assert got >= min(seen, 1)  # nobody else writes between the two
            assert into[:got] == [payload(n) for n in range(first, first + got)]
            assert not any(into[n] == payload(first + n) for n in range(got, 8))
        assert admin.info("stats")["evicted_keys"] > 0
        assert tier.stats.bad_frames == tier.stats.errors == 0


@pytest.mark.parametrize("refusal", [b"-BUSY script\r\n", b"-NOAUTH who\r\n", b"-READONLY no\r\n"])
def test_a_refusal_is_never_a_hit(refusal: bytes):
    with scripted(*[refusal * 10] * 2) as server:
        tier = redis_tier(server.url, timeout_ms=300)
        into = blank(1)
        for verb in (lambda: tier.prefix([ref(0)]), lambda: tier.read([ref(0)], into)):
            with pytest.raises(TierDown, match=refusal.split()[0].decode()[1:]):
                verb()
        assert into == blank(1)
        tier.close()


def test_bytes_that_were_refused_do_not_count_although_their_metadata_was_taken():
    absent, taken, refused = b":0\r\n" * 8, b"+OK\r\n:10\r\n:1\r\n", b"-OOM full\r\n:10\r\n:1\r\n"
    forgotten = b":0\r\n:1\r\n"
    with scripted(absent + taken + refused + forgotten) as server:
        tier = redis_tier(server.url, connections=1)
        assert tier.write(*chunks(2)) == 1
        assert tier.stats.errors == 1
        tier.close()


def test_a_server_restart_between_two_calls_is_a_cold_cache_not_an_error(tier: RedisTier, valkey: Any):
    refs, payloads = chunks(3)
    tier.write(refs, payloads)
    valkey.restart()
    assert tier.prefix(refs) == 0
    assert tier.write(refs, payloads) == 3
    assert tier.read(refs, blank(3)) == 3
    assert tier.stats.errors == 0


def test_a_dead_server_is_down_at_once_and_found_again(tier: RedisTier, valkey: Any):
    tier.write(*chunks(1))
    valkey.kill()
    with pytest.raises(TierDown):
        tier.prefix([ref(0)])
    with pytest.raises(TierDown, match="waiting to reconnect"):
        tier.prefix([ref(0)])
    valkey.start()
    assert eventually(lambda: tier.write(*chunks(1))) == 1


def test_a_server_that_starts_after_the_tier_is_found(valkey: Any):
    valkey.kill()
    tier = redis_tier(valkey.url)
    with pytest.raises(TierDown):
        tier.prefix([ref(0)])
    valkey.start()
    assert eventually(lambda: tier.write(*chunks(1))) == 1
    tier.close()


def test_a_conversation_left_in_the_middle_of_a_reply_is_not_taken_up_again(tier: RedisTier):
    """Whatever the reason: what was not read yet must never be another command's answer."""
    with pytest.raises(ValueError, match="ours"), tier._pool.session(time.monotonic() + 5) as session:  # noqa: PT012
        (ticket,) = session.ask([(b"k", (b"GET", b"k"))])
        conn = session.bulk(ticket)
        raise ValueError("a bug of ours")
    assert conn.closed


def eventually(verb: Any) -> int:
    """Call until the tier is up again; pytest-timeout bounds it."""
    while True:
        try:
            return int(verb())
        except TierDown:
            continue


def test_a_server_killed_while_it_is_asked_never_yields_wrong_bytes(valkey: Any):
    tier = redis_tier(valkey.url, connections=1)
    refs, payloads = chunks(8)
    for _ in range(4):
        assert eventually(lambda: tier.write(refs, payloads)) == 8
        with ThreadPoolExecutor(1) as pool:
            os.kill(valkey.pid, signal.SIGSTOP)
            reading = pool.submit(tier.read, refs, blank(8))
            valkey.kill()
            with pytest.raises(TierDown):
                reading.result()
        valkey.start()
        assert eventually(lambda: tier.prefix(refs)) == 0  # an empty server
    tier.close()


def test_passwords_and_databases_come_from_the_url_and_stay_out_of_messages(valkey: Any, admin: redis.Redis):
    with configured(admin, "requirepass", "s3cret/@"):
        good = redis_tier(f"redis://:s3cret%2F%40@127.0.0.1:{valkey.port}/3")
        bad = redis_tier(f"redis://:n0t-the-one@127.0.0.1:{valkey.port}/3")
        none = redis_tier(f"redis://127.0.0.1:{valkey.port}/3")
        assert good.write(*chunks(1)) == 1
        with pytest.raises(TierDown, match="AUTH refused: WRONGPASS") as refused:
            bad.prefix([ref(0)])
        with pytest.raises(TierDown, match="NOAUTH"):
            none.prefix([ref(0)])
        assert "n0t-the-one" not in str(refused.value)
        for tier in (good, bad, none):
            tier.close()
    assert admin.dbsize() == 0
    admin.select(3)
    assert admin.dbsize() == 2


@pytest.mark.parametrize(
    "url",
    ["http://x", "rediss://x?ssl_ca_certs=/nowhere", "redis://h:port", "redis://h/db", "localhost:6379"],
)
def test_a_url_it_cannot_use_is_refused_at_once_without_repeating_it(url: str):
    with pytest.raises(ConfigError, match="redis_url") as refused:
        redis_tier(url)
    assert url not in str(refused.value)
