"""Orders about workers, in a real Valkey: whatever happens to it, what was said last holds."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cacheengine.index_orders import ORDERS, Orders
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
        await orders.close()

    with valkey.client() as admin:
        admin.execute_command(*line.split())
        try:
            asyncio.run(main(admin))
        finally:
            admin.execute_command("ACL DELUSER", "cairn-gateway")


def test_orders_do_not_expire(valkey: ValkeyServer) -> None:
    async def main() -> None:
        orders = Orders(valkey.unix_url)
        await orders.give("a", "drained")
        await orders.close()

    asyncio.run(main())
    with valkey.client() as client:
        assert client.ttl(ORDERS) == -1


def test_two_gateways_and_a_forgetful_redis_agree_with_a_model(valkey: ValkeyServer) -> None:
    class Machine(RuleBasedStateMachine):
        """Two gateways that refresh in between, as every second; Redis may forget everything."""

        @initialize()
        def begin(self) -> None:
            valkey.flush()
            self.runner = asyncio.Runner()
            self.gateways = [Orders(valkey.unix_url), Orders(valkey.unix_url)]
            self.said: dict[str, str] = {}
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
