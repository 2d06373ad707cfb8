"""The shared tier against a real Valkey: its layout, and what spoiled or missing values cost."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from cacheengine.frame import HEADER_BYTES, pack
from cacheengine.keys import Namespace, digest
from cacheengine.tier import Ref
from cacheengine.tiers.redis import RedisTier, escape
from cacheengine.tiers.resp import Connection
from tests.cacheengine.tiers.kit import (
    NAMESPACE,
    PAYLOAD,
    TOKENS,
    blank,
    buffer,
    chunks,
    key,
    payload,
    redis_tier,
    ref,
)


@pytest.fixture
def tier(valkey: Any) -> Iterator[RedisTier]:
    made = redis_tier(valkey.unix_url, connections=1)
    yield made
    made.close()


def meta(n: int) -> str:
    return f"org/model@1@0@{key(n).hex()}"


def data(n: int) -> str:
    return meta(n) + "_bytes"


def reconnects(admin: redis.Redis) -> int:
    return int(admin.info("stats")["total_connections_received"])


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


def test_a_short_chunk_is_kept_and_says_how_many_tokens_it_has(tier: RedisTier, admin: redis.Redis):
    refs, sizes = [ref(0), ref(1), ref(2)], [PAYLOAD, PAYLOAD, PAYLOAD // 4]
    payloads = [payload(n, size) for n, size in enumerate(sizes)]
    into = [buffer(size) for size in sizes]
    assert tier.write(refs, payloads) == 3
    assert tier.prefix(refs) == 3
    assert tier.read(refs, into) == 3
    assert into == payloads
    facts = admin.hmget(meta(2), "tokens", "bytes")
    assert facts == [str(TOKENS // 4).encode(), str(HEADER_BYTES + PAYLOAD // 4).encode()]
    assert tier.stats.bytes_read == tier.stats.bytes_written == sum(sizes)


def test_a_chunk_of_another_length_than_expected_is_a_miss(tier: RedisTier):
    assert tier.write(*chunks(2)) == 2
    short = [buffer(), buffer(PAYLOAD // 2)]
    assert tier.read([ref(0), ref(1)], short) == 1
    assert tier.stats.bad_frames == 1
    assert short[1] == buffer(PAYLOAD // 2)


def test_an_empty_buffer_is_a_bug(tier: RedisTier):
    with pytest.raises(ValueError, match="buffer of 0 bytes"):
        tier.write([ref(0)], [buffer()[:0]])


def test_a_hit_renews_both_expiries_without_a_round_trip_of_its_own(
    tier: RedisTier, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
):
    refs, payloads = chunks(6)
    tier.write(refs, payloads)
    for n in range(6):
        admin.expire(meta(n), 5)
        admin.expire(data(n), 5)
    pieces: list[list[bytes]] = []
    send = Connection.send

    def seen(conn: Connection, *commands: Any) -> None:
        pieces.append([command[0] for command in commands])
        send(conn, *commands)

    monkeypatch.setattr(Connection, "send", seen)
    assert tier.read(refs, blank(6)) == 6
    assert [piece.count(b"GET") for piece in pieces] == [4, 1, 1, *[0] * (len(pieces) - 3)]
    assert pieces[-1].count(b"EXPIRE") == 12
    assert min(admin.ttl(name(n)) for n in range(6) for name in (meta, data)) > 5


def test_what_was_pinned_for_ever_stays_so_when_it_is_read_or_written_again(
    tier: RedisTier, admin: redis.Redis
):
    refs, payloads = chunks(1)
    tier.write(refs, payloads)
    for name in (meta(0), data(0)):
        admin.persist(name)
    assert tier.read(refs, blank(1)) == 1
    assert tier.write(refs, payloads) == 1
    assert [admin.ttl(name) for name in (meta(0), data(0))] == [-1, -1]


def test_what_was_read_before_a_gap_is_renewed_too(tier: RedisTier, admin: redis.Redis):
    refs, payloads = chunks(8)
    tier.write(refs, payloads)
    for n in range(8):
        admin.expire(data(n), 5)
    admin.delete(data(2))
    assert tier.read(refs, blank(8)) == 2
    assert [admin.ttl(data(n)) > 5 for n in range(4)] == [True, True, False, False]


def test_looking_changes_nothing(tier: RedisTier, admin: redis.Redis):
    tier.write(*chunks(2))
    admin.expire(data(1), 5)
    assert tier.prefix([ref(0), ref(1)]) == 2
    assert admin.ttl(data(1)) <= 5


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


def test_slots_do_not_matter_here(tier: RedisTier):
    tier.write([ref(0)], [payload(0)])
    assert tier.prefix([Ref(key(0))]) == 1
