"""The shared tier against a real Valkey: its layout, and every way a server can fail."""

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from cacheengine.config import ConfigError
from cacheengine.errors import TierDown
from cacheengine.frame import HEADER_BYTES, pack
from cacheengine.keys import Namespace, digest
from cacheengine.tier import Ref
from cacheengine.tiers.redis import RedisTier, escape
from tests.cacheengine.tiers.kit import (
    NAMESPACE,
    PAYLOAD,
    TOKENS,
    ScriptedServer,
    blank,
    buffer,
    chunks,
    key,
    payload,
    redis_tier,
    ref,
    scripted,
)


@pytest.fixture
def tier(valkey: Any) -> Iterator[RedisTier]:
    made = redis_tier(valkey.unix_url, connections=1)
    yield made
    made.close()


@pytest.fixture
def admin(valkey: Any) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        yield client


def meta(n: int) -> str:
    return f"org/model@1@0@{key(n).hex()}"


def data(n: int) -> str:
    return meta(n) + "_bytes"


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


def test_a_chunk_is_a_hash_and_its_bytes_that_both_expire(tier: RedisTier, admin: redis.Redis):
    tier.write(*chunks(1))
    assert sorted(admin.keys()) == [meta(0).encode(), data(0).encode()]
    facts = {k.decode(): v.decode() for k, v in admin.hgetall(meta(0)).items()}
    created, checksum = facts.pop("created"), facts.pop("checksum")
    assert facts == {
        "model_name": "org/model", "format": "cairn-frame-1", "world_size": "1", "worker_id": "w0",
        "tokens": "256", "dtype": "float32", "layout": "test", "bytes": str(admin.strlen(data(0))),
    }  # fmt: skip
    header = pack(NAMESPACE, key(0), b"", key(0), payload(0), TOKENS, 0, 1)
    assert admin.get(data(0)) == header + payload(0).tobytes()
    assert int(created) > 0
    assert int(checksum, 16).to_bytes(8, "little") in header
    assert 0 < admin.ttl(meta(0)) <= 60
    assert 0 < admin.ttl(data(0)) <= 60


def test_a_model_name_cannot_break_its_key_apart(valkey: Any, admin: redis.Redis):
    tier = redis_tier(valkey.unix_url, model="a@b c%d\t/e")
    tier.write(*chunks(1))
    assert f"a%40b%20c%25d%09/e@1@0@{key(0).hex()}".encode() in admin.scan_iter()
    assert escape("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    tier.close()


def test_what_is_there_is_refreshed_not_sent_again(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(3)
    tier.write(refs, payloads)
    admin.expire(meta(1), 5)
    admin.expire(data(1), 5)
    sent = tier.stats.bytes_written
    assert tier.write(refs, payloads) == 3
    assert tier.stats.bytes_written == sent
    assert admin.ttl(meta(1)) > 5
    assert admin.ttl(data(1)) > 5


def test_another_rank_and_another_world_share_nothing(tier: RedisTier, valkey: Any):
    tier.write(*chunks(1))
    other = RedisTier(valkey.url, "org/model", NAMESPACE, PAYLOAD, TOKENS, "", "", 1, 2, "w1", 60, 5000)
    assert other.prefix([ref(0)]) == 0
    other.close()


def test_evicted_bytes_end_the_prefix_and_their_metadata_goes(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    admin.delete(data(2))
    assert tier.prefix(refs) == 2
    assert not admin.exists(meta(2))
    assert admin.exists(meta(3), data(3)) == 2


def test_no_chunk_ever_takes_the_place_of_an_evicted_one(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    admin.delete(data(1))
    into = blank(6)
    assert tier.read(refs, into) == 1
    assert into[0] == payloads[0]
    assert not any(view == later for view in into[1:] for later in payloads)


def test_a_missing_reply_never_costs_a_connection(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    admin.delete(data(1))
    before = reconnects(admin)
    for _ in range(50):
        assert tier.read(refs, blank(6)) == 1
    assert tier.read(refs[2:], blank(4)) == 4
    assert reconnects(admin) == before


def test_bytes_without_metadata_may_be_a_write_in_progress(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(2)
    tier.write(refs, payloads)
    admin.delete(meta(0))
    assert tier.prefix(refs) == 0
    assert admin.exists(data(0))
    assert tier.write(refs, payloads) == 2
    assert tier.prefix(refs) == 2


FRAMED = pack(NAMESPACE, key(1), key(0), key(0), payload(1), TOKENS, 0, 1) + payload(1)
SPOILED = {
    "empty": b"",
    "cut inside the header": b"CRNF",
    "cut inside the payload": FRAMED[:-1],
    "too long": FRAMED + b"x",
    "noise": random.Random(0).randbytes(HEADER_BYTES + PAYLOAD),
    "another chunk": pack(NAMESPACE, key(2), key(1), key(0), payload(2), TOKENS, 0, 1) + payload(2),
    "another model": pack(Namespace(digest(b"x")), key(1), b"", b"", payload(1), TOKENS, 0, 1) + payload(1),
    "another rank": pack(NAMESPACE, key(1), key(0), key(0), payload(1), TOKENS, 1, 2) + payload(1),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_value_is_counted_dropped_and_written_again(
    tier: RedisTier, admin: redis.Redis, spoiled: bytes
):
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    admin.set(data(1), spoiled)
    before = reconnects(admin)
    assert tier.read(refs, blank(6)) == 1
    assert tier.stats.bad_frames == 1
    assert not admin.exists(meta(1), data(1))
    assert tier.write(refs, payloads) == 6
    into = blank(6)
    assert tier.read(refs, into) == 6
    assert into == payloads
    assert reconnects(admin) == before


@pytest.mark.parametrize("name", [meta, data])
def test_a_key_of_another_type_is_cleared_out_of_the_way(tier: RedisTier, admin: redis.Redis, name: Any):
    refs, payloads = chunks(3)
    tier.write(refs[:1], payloads[:1])
    admin.lpush(name(1), "squatter")
    tier.read(refs, blank(3))
    tier.write(refs, payloads)
    assert tier.write(refs, payloads) == 3
    assert tier.read(refs, blank(3)) == 3


@pytest.mark.parametrize("seed", range(200))
def test_a_flipped_bit_costs_at_most_its_own_chunk(tier: RedisTier, admin: redis.Redis, seed: int):
    rng = random.Random(seed)
    refs, payloads = chunks(3)
    tier.write(refs, payloads)
    n, at = rng.randrange(3), rng.choice((rng.randrange(128), rng.randrange(128, HEADER_BYTES + PAYLOAD)))
    byte = admin.getrange(data(n), at, at)[0]
    admin.setrange(data(n), at, bytes([byte ^ 1 << rng.randrange(8)]))
    into = blank(3)
    assert tier.read(refs, into) == n
    assert into[:n] == payloads[:n]
    assert (tier.stats.bad_frames, tier.prefix(refs)) == (1, n)


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
        with pytest.raises(TierDown, match="READONLY"):
            tier.drop(refs)
        assert tier.read(refs, blank(4)) == 2
    finally:
        admin.replicaof("NO", "ONE")
    assert tier.write(refs, payloads) == 4


@pytest.mark.parametrize(
    "refusal", [b"-LOADING busy\r\n", b"-MOVED 1 127.0.0.1:2\r\n", b"-NOPERM no\r\n", b"-MASTERDOWN no\r\n"]
)
def test_a_server_that_refuses_is_down(refusal: bytes):
    with scripted(*[refusal * 10] * 4) as server:
        tier = redis_tier(server.url)
        for verb in (lambda: tier.prefix([ref(0)]), lambda: tier.read([ref(0)], blank(1))):
            with pytest.raises(TierDown, match=refusal.split()[0].decode()[1:]):
                verb()
        with pytest.raises(TierDown, match=refusal.split()[0].decode()[1:]):
            tier.write(*chunks(1))
        with pytest.raises(TierDown, match=refusal.split()[0].decode()[1:]):
            tier.drop([ref(0)])
        assert tier.stats.errors == 4
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
    with scripted(script, b"$-1\r\n") as server:
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
    tier.close()
    tier = redis_tier(valkey.url, connections=1)
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
    "url", ["http://x", "rediss://x", "redis://h:port", "redis://h/db", "localhost:6379"]
)
def test_a_url_it_cannot_use_is_refused_at_once_without_repeating_it(url: str):
    with pytest.raises(ConfigError, match="redis_url") as refused:
        redis_tier(url)
    assert url not in str(refused.value)


def test_slots_do_not_matter_here(tier: RedisTier):
    tier.write([ref(0)], [payload(0)])
    assert tier.prefix([Ref(key(0))]) == 1
