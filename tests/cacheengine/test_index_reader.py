"""The fleet as a gateway reads it, with strangers in it and more workers than it may have."""

import pytest

from cacheengine.errors import IndexDown
from cacheengine.index_reader import MAX_FLEET
from cacheengine.index_schema import FLEET
from tests.cacheengine.index_rig import INFO, NS, Loop
from tests.conftest import ValkeyServer


def test_bytes_that_are_no_text_cost_nobody_else_the_lease(valkey: ValkeyServer) -> None:
    valkey.flush()
    loop = Loop(valkey.unix_url, deadline_ms=2000)
    try:
        with valkey.client() as client:
            client.zadd(FLEET, {f"{NS.hex()}:w1": 1, f"{NS.hex()}:w2": 2, b"\xff:x": 3})
            client.hset(f"cairn:{NS.hex()}:worker:w1", mapping=INFO.fields())
            client.hset(f"cairn:{NS.hex()}:worker:w2", mapping={"model": b"\xff"})
        assert list(loop.fleet()) == ["w1"]
    finally:
        loop.close()


def test_a_fleet_that_is_too_large_is_said_once_and_again_when_it_was_not(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> int:
        loop.fleet()
        loop.fleet()
        return sum("further ones are not read" in record.getMessage() for record in caplog.records)

    valkey.flush()
    loop = Loop(valkey.unix_url, deadline_ms=2000)
    try:
        with valkey.client() as client:
            client.zadd(FLEET, {f"{NS.hex()}:w{n}": n for n in range(MAX_FLEET)})
            assert said() == 0
            client.zadd(FLEET, {"one more": 0})
            assert said() == 1
            client.zrem(FLEET, "one more")
            assert said() == 1
            client.zadd(FLEET, {"one more": 0})
            assert said() == 2
    finally:
        loop.close()


def test_a_lease_of_another_type_costs_one_worker(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.flush()
    loop = Loop(valkey.unix_url, deadline_ms=2000)
    try:
        with valkey.client() as client:
            client.zadd(FLEET, {f"{NS.hex()}:w1": 1, f"{NS.hex()}:w2": 2})
            client.hset(f"cairn:{NS.hex()}:worker:w1", mapping=INFO.fields())
            client.set(f"cairn:{NS.hex()}:worker:w2", "no hash")
        for _ in range(2):
            assert list(loop.fleet()) == ["w1"]
        assert caplog.text.count(f"ignoring the lease of {NS.hex()}:w2: WRONGTYPE") == 1
    finally:
        loop.close()


def test_a_fleet_of_another_type_is_a_fleet_nobody_can_read(valkey: ValkeyServer) -> None:
    valkey.flush()
    loop = Loop(valkey.unix_url, deadline_ms=2000)
    try:
        with valkey.client() as client:
            client.set(FLEET, "no set")
        with pytest.raises(IndexDown, match="WRONGTYPE"):
            loop.fleet()
    finally:
        loop.close()
