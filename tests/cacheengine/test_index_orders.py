"""Orders about workers, in a real Valkey: whatever happens to it, what was said last holds."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cacheengine import index_orders
from cacheengine.index_orders import ORDERS, VERSION, Orders
from tests.conftest import ValkeyServer

WORKERS = st.sampled_from(["a", "b", "10.0.0.1:8000"])


def test_orders_are_what_every_gateway_reads(valkey: ValkeyServer) -> None:
    async def main() -> None:
        one, two = Orders(valkey.unix_url), Orders(valkey.unix_url)
        assert await two.read() == {}
        await one.give("a", "drained")
        assert await two.read() == await one.read() == {"a": "drained"}
        await two.give("a", "")
        assert await one.read() == {}
        await one.close()
        await two.close()

    asyncio.run(main())


def test_a_gateway_with_the_documented_rights_gives_orders_and_tells_them_again(valkey: ValkeyServer) -> None:
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("ACL SETUSER cairn-gateway "))

    async def main(admin: redis.Redis) -> None:
        orders = Orders(f"redis://cairn-gateway:PASSWORD@127.0.0.1:{valkey.port}")
        await orders.give("a", "drained")
        await orders.give("b", "drained")
        await orders.give("b", "")
        admin.flushdb()
        assert await orders.read() == {"a": "drained"}
        assert await orders.sweep([]) == await orders.sweep(["a"]) == []
        await orders.close()

    with valkey.client() as admin:
        admin.execute_command(*line.split())
        try:
            asyncio.run(main(admin))
        finally:
            admin.execute_command("ACL DELUSER", "cairn-gateway")


def missed(valkey: ValkeyServer, worker_id: str) -> int:
    with valkey.client() as client:
        return int(client.hget(ORDERS, f"@missed:{worker_id}") or 0)


def test_an_order_about_a_worker_nobody_sees_any_more_is_forgotten_in_the_end(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_orders, "SWEEP_SECONDS", 0)
    monkeypatch.setattr(index_orders, "KEPT_HOURS", 3)

    async def main() -> None:
        one, two = Orders(valkey.unix_url), Orders(valkey.unix_url)
        for worker in ("a", "b", "c"):
            await one.give(worker, "drained")
        assert await two.read() == dict.fromkeys("abc", "drained")
        for _ in range(9):  # what one of them sees is there
            assert await one.sweep(["b"]) == await two.sweep(["a", "c", "who?"]) == []
        assert [await one.sweep(["a", "b"]) for _ in range(3)] == [[], [], []]
        await one.give("c", "removed@1")  # said again: counted from here
        assert [await one.sweep(["a", "b"]) for _ in range(4)] == [[], [], [], ["c"]]
        for gateway in (two, one, two):  # and nobody takes it for a loss
            assert await gateway.read() == dict.fromkeys("ab", "drained")
        await one.close()
        await two.close()

    asyncio.run(main())


def test_absence_is_counted_once_an_hour_however_many_gateways_look(valkey: ValkeyServer) -> None:
    async def main() -> None:
        gateways = [Orders(valkey.unix_url) for _ in range(3)]
        await gateways[0].give("a", "drained")
        for gateway in gateways * 3:
            assert await gateway.sweep([]) == []
        assert missed(valkey, "a") == 1
        assert await gateways[0].sweep(["a"]) == []
        assert missed(valkey, "a") == 0  # at once
        for gateway in gateways:
            await gateway.close()

    asyncio.run(main())


def test_where_there_are_no_orders_sweeping_writes_nothing(valkey: ValkeyServer) -> None:
    async def main() -> None:
        orders = Orders(valkey.unix_url)
        assert await orders.sweep(["a"]) == []
        await orders.close()

    asyncio.run(main())
    with valkey.client() as client:
        assert not client.exists(ORDERS)


def test_orders_do_not_expire(valkey: ValkeyServer) -> None:
    async def main() -> None:
        orders = Orders(valkey.unix_url)
        await orders.give("a", "drained")
        await orders.close()

    asyncio.run(main())
    with valkey.client() as client:
        assert client.ttl(ORDERS) == -1


def test_orders_that_an_older_backup_brings_back_or_takes_away_are_put_right(valkey: ValkeyServer) -> None:
    async def main(admin: redis.Redis) -> None:
        orders = Orders(valkey.unix_url)
        await orders.give("a", "drained")
        backup = admin.hgetall(ORDERS)
        await orders.give("a", "")
        await orders.give("b", "drained")
        admin.delete(ORDERS)
        admin.hset(ORDERS, mapping=backup)
        assert await orders.read() == {"b": "drained"}
        other = Orders(valkey.unix_url)
        assert await other.read() == {"b": "drained"}
        await orders.close()
        await other.close()

    with valkey.client() as admin:
        asyncio.run(main(admin))


def test_of_two_who_tell_again_the_one_that_heard_the_last_order_wins(valkey: ValkeyServer) -> None:
    async def main(admin: redis.Redis) -> None:
        late, current = Orders(valkey.unix_url), Orders(valkey.unix_url)
        await late.give("a", "drained")
        await current.give("b", "drained")
        admin.delete(ORDERS)
        assert await late.read() == {"a": "drained"}
        assert await current.read() == await late.read() == {"a": "drained", "b": "drained"}
        await late.close()
        await current.close()

    with valkey.client() as admin:
        asyncio.run(main(admin))


@pytest.mark.parametrize("version", [b"x", b"\xff", b""])
def test_bytes_nobody_of_us_wrote_change_no_order(valkey: ValkeyServer, version: bytes) -> None:
    async def main(admin: redis.Redis) -> None:
        orders = Orders(valkey.unix_url)
        await orders.give("a", "drained")
        admin.hset(ORDERS, b"\xff", b"\xff")
        assert (await orders.read())["a"] == "drained"
        admin.hset(ORDERS, VERSION, version)
        assert (await orders.read())["a"] == "drained"
        await orders.give("a", "")
        assert "a" not in await orders.read()
        await orders.close()

    with valkey.client() as admin:
        asyncio.run(main(admin))


def test_two_gateways_and_a_forgetful_redis_agree_with_a_model(valkey: ValkeyServer) -> None:
    class Machine(RuleBasedStateMachine):
        """Two gateways that refresh in between, as every second; Redis may forget everything."""

        @initialize()
        def begin(self) -> None:
            valkey.flush()
            self.runner = asyncio.Runner()
            self.gateways = [Orders(valkey.unix_url), Orders(valkey.unix_url)]
            self.said: dict[str, str] = {}
            self.backup: dict[bytes, bytes] | None = None
            self.refreshed()

        def run(self, job: Coroutine[Any, Any, Any]) -> Any:
            return self.runner.run(job)

        def refreshed(self) -> None:
            for gateway in self.gateways:
                assert self.run(gateway.read()) == self.said

        @rule(which=st.integers(0, 1), worker=WORKERS, order=st.sampled_from(["drained", "removed@1", ""]))
        def give(self, which: int, worker: str, order: str) -> None:
            self.run(self.gateways[which].give(worker, order))
            self.said.pop(worker, None)
            if order:
                self.said[worker] = order
            self.refreshed()

        @rule(first=st.integers(0, 1))
        def forget(self, first: int) -> None:
            with valkey.client() as client:
                client.flushall()
            assert self.run(self.gateways[first].read()) == self.said
            self.refreshed()

        @rule(which=st.integers(0, 1), worker=WORKERS)
        def forget_and_give(self, which: int, worker: str) -> None:
            with valkey.client() as client:
                client.flushall()
            self.give(which, worker, "drained")

        @rule()
        def back_up(self) -> None:
            with valkey.client() as client:
                self.backup = client.hgetall(ORDERS)

        @precondition(lambda self: self.backup is not None)
        @rule(first=st.integers(0, 1))
        def restore(self, first: int) -> None:
            with valkey.client() as client:
                client.delete(ORDERS)
                if self.backup:
                    client.hset(ORDERS, mapping=self.backup)
            assert self.run(self.gateways[first].read()) == self.said
            self.refreshed()

        def teardown(self) -> None:
            for gateway in self.gateways:
                self.run(gateway.close())
            self.runner.close()

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=25, stateful_step_count=12, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )
