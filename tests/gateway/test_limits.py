"""The script against its twin, both against what they promise, and what happens when Redis is away."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import TooMany
from gateway.keyring import Key
from gateway.limits import Limits, duration
from gateway.limits_book import Book, Question, Standing, Verdict
from gateway.limits_redis import GATEWAYS, Gateways
from tests.conftest import ValkeyServer

PATIENT = 20.0  # seconds for Redis: a slow machine is not a Redis that is away
SCRIPT = (Path(__file__).parents[2] / "gateway" / "limits.lua").read_text()
LIMITED = Key(id="k", tenant="t", rpm=6, tpm=6000, concurrency=3, tokens_per_month=100_000)

steps = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 250, 9_999, 60_000]),  # ms since the step before
        st.builds(
            Question,
            key=st.sampled_from(["k", "l"]),
            gateway=st.sampled_from(["g", "h", "i"]),
            month=st.sampled_from(["2026-01", "2026-02"]),
            carried=st.integers(0, 4),
            lease=st.sampled_from([1, 15_000]),
            rpm=st.sampled_from([0, 1, 3, 7.5]),
            tpm=st.sampled_from([0, 100, 333.3]),
            concurrency=st.integers(0, 3),
            budget=st.sampled_from([0, 500]),
            take=st.booleans(),
            tokens=st.integers(0, 400),
            settled=st.integers(-300, 300),
            spent=st.integers(0, 200),
            known=st.sampled_from([0, 0, 150, 400]),
        ),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps)
def test_the_script_and_its_twin_say_the_same(valkey_server: ValkeyServer, steps: Any) -> None:
    valkey_server.start()
    with valkey_server.client() as client:
        client.flushall()
        script = client.register_script(SCRIPT)
        book, now = Book(), 1_790_000_000_000
        for passed, question in steps:
            now += passed
            theirs = script(["cairn:{tenant:t}:used"], [msgspec.json.encode(at(question, now))])
            assert Standing(*map(int, theirs)) == book.ask("t", question, now)


def at(question: Question, now: int) -> Question:
    return msgspec.structs.replace(question, now=now)


@settings(deadline=None)
@given(
    limit=st.integers(1, 20),
    pauses=st.lists(st.integers(0, 20_000), min_size=1, max_size=80),
)
def test_no_minute_ever_sees_more_than_two_minutes_worth_and_waiting_as_told_always_helps(
    limit: int, pauses: list[int]
) -> None:
    book, now, taken = Book(), 0, []
    for pause in pauses:
        now += pause
        question = Question("k", "g", "2026-01", carried=1, rpm=limit, take=True)
        said = book.ask("t", question, now)
        if said.verdict == Verdict.REQUESTS:
            now += said.wait_ms
            said = book.ask("t", question, now)
        assert said.verdict == Verdict.TAKEN
        taken.append(now)
    for first in taken:
        assert sum(first <= one < first + 60_000 for one in taken) <= 2 * limit
    assert sum(one == taken[0] for one in taken) <= limit


def test_what_one_key_uses_is_not_taken_from_another_but_the_month_is_the_tenant_s() -> None:
    book = Book()

    def take(key: str) -> int:
        question = Question(key, "g", "2026-01", carried=1, rpm=1, budget=100, take=True, spent=40)
        return book.ask("t", question, 0).verdict

    assert [take("a"), take("a"), take("b")] == [Verdict.TAKEN, Verdict.REQUESTS, Verdict.MONTH]


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0ms"), (120, "120ms"), (1500, "1.5s"), (20_000, "20s"), (360_000, "6m0s"), (3_661_001, "1h1m2s")],
)
def test_durations_are_written_as_openai_does(ms: int, text: str) -> None:
    assert duration(ms) == text


def run(work: Callable[..., Awaitable[None]], *urls: str) -> None:
    """`work` with open limits at each URL, all in one loop."""

    async def whole() -> None:
        made = [Limits(url, PATIENT) for url in urls]
        running = []
        for limits in made:
            limits.open()
            running.append(asyncio.create_task(limits.run()))
        try:
            for limits, url in zip(made, urls, strict=True):
                await until(lambda limits=limits, url=url: limits.shared or not url)
            await work(*made)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for limits in made:
                await limits.close()

    asyncio.run(whole())


async def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.01)


def test_places_are_counted_over_gateways_and_come_back_to_all(valkey: ValkeyServer) -> None:
    async def work(one: Limits, two: Limits) -> None:
        key = Key(id="k", tenant="t", concurrency=3)
        grants = [await limits.take(key, 1, 1) for limits in (one, two, one)]
        with pytest.raises(TooMany) as full:
            await two.take(key, 1, 1)
        assert full.value.short == "concurrency"
        one.settle(grants[0], 2)
        one.settle(grants[0], 2)

        async def taken() -> bool:
            try:
                two.settle(await two.take(key, 1, 1), 1)
            except TooMany:
                return False
            return True

        for _ in range(3000):
            if await taken():
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("the place never came back")

    run(work, valkey.url, valkey.unix_url)


def test_what_a_dead_gateway_carried_expires(valkey: ValkeyServer) -> None:
    with valkey.client() as client:
        script = client.register_script(SCRIPT)

        def take(gateway: str, lease: int) -> int:
            question = Question("k", gateway, "2026-01", carried=1, concurrency=1, take=True, lease=lease)
            return int(script(["cairn:{tenant:t}:used"], [msgspec.json.encode(question)])[0])

        assert take("dead", 50) == Verdict.TAKEN
        end = time.monotonic() + 30
        while take("living", 15_000) != Verdict.TAKEN:
            assert time.monotonic() < end


def test_without_redis_each_of_n_gateways_has_its_part_and_nobody_is_refused_for_that(
    valkey: ValkeyServer,
) -> None:
    async def work(one: Limits, two: Limits) -> None:
        assert one.gateways
        assert two.gateways
        for limits in (one, two, one):
            assert limits.gateways
            await limits.gateways.beat()
        await until(lambda: one.gateways.alive == two.gateways.alive == 2)
        spent = await one.take(LIMITED, 500, 500)
        one.settle(spent, 1000)
        await until(lambda: one.account(LIMITED).heard[1] == 1000)
        valkey.kill()
        await until(lambda: not one.shared and not two.shared)
        for limits in (one, two):
            grants = [await limits.take(LIMITED, 100, 100)]
            limits.settle(grants[0], 100)
            for _ in range(2):
                limits.settle(await limits.take(LIMITED, 100, 100), 100)
            with pytest.raises(TooMany) as full:
                await limits.take(LIMITED, 100, 100)
            assert full.value.short == "requests"
        assert one.account(LIMITED).month_tokens == 1300, "what Redis knew, and ours"
        large = Key(id="large", tenant="t", tpm=1000)
        one.settle(await one.take(large, 400, 500), 10)
        valkey.start()

        def month() -> int:
            with valkey.client() as client:
                return int((client.hget("cairn:{tenant:t}:used", "m") or b"- 0").split()[1])

        # the empty server hears 1000 of `one`, in which is lost what others said before
        await until(lambda: month() >= 1000 + 300)
        assert month() <= 1000 + 300 + 300 + 10

    try:
        run(work, valkey.url, valkey.url)
    finally:
        valkey.start()


def test_a_redis_that_lost_its_memory_does_not_start_the_month_anew(valkey: ValkeyServer) -> None:
    key = Key(id="k", tenant="t", tokens_per_month=1000)

    async def work(one: Limits, two: Limits) -> None:
        for limits, month in ((one, 400), (two, 800)):
            limits.settle(await limits.take(key, 100, 100), 400)
            await until(lambda limits=limits, month=month: limits.account(key).heard[1] == month)
        with valkey.client() as client:
            client.flushall()
        for limits in (one, two, one):
            with pytest.raises(TooMany) as over:
                await limits.take(key, 200, 101 if limits is two else 500)
            assert over.value.short == "month"
        assert two.account(key).month_tokens == 800

    run(work, valkey.url, valkey.url)


def test_a_redis_that_hangs_costs_a_deadline_and_no_error(valkey: ValkeyServer) -> None:
    async def work() -> None:
        limits = Limits(valkey.url)  # with the deadline of every day
        limits.open()
        try:
            await until(lambda: limits.shared)
            with valkey.frozen():
                for _ in range(6):
                    limits.settle(await limits.take(Key(id="k", tenant="t", rpm=100), 1, 1), 1)
                assert not limits.shared, "after three misses nobody waits"
        finally:
            await limits.close()

    asyncio.run(work())


def test_on_a_cluster_one_tenant_is_one_slot(cluster: Any) -> None:
    cluster.flush()

    async def work(limits: Limits) -> None:
        for tenant in ("a", "b", "c", "d"):
            key = Key(id=f"key-{tenant}", tenant=tenant, rpm=1, tpm=100, tokens_per_month=1000)
            grant = await limits.take(key, 10, 10)
            assert grant.shared
            limits.settle(grant, 20)
            with pytest.raises(TooMany):
                await limits.take(key, 10, 10)

    run(work, cluster.url)


def test_a_user_with_the_documented_rights_counts_for_all_gateways(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("ACL SETUSER cairn-gateway "))
    url = f"redis://cairn-gateway:PASSWORD@127.0.0.1:{valkey.port}"

    async def work(one: Limits, two: Limits) -> None:
        for limits in (one, two):
            grant = await limits.take(LIMITED, 10, 10)
            assert grant.shared
            limits.settle(grant, 20)
        await until(lambda: one.gateways and one.gateways.alive == 2)
        with valkey.client() as admin:
            admin.execute_command("ACL SETUSER", "cairn-gateway", "-expire")
        for _ in range(2):
            grant = await one.take(LIMITED, 1, 1)
            assert not grant.shared
            one.settle(grant, 2)
        assert 1 <= caplog.text.count("has no permissions") <= 2, "said, by each of them once"

    with valkey.client() as admin:
        admin.execute_command(*line.split())
        try:
            run(work, url, url)
        finally:
            admin.execute_command("ACL DELUSER", "cairn-gateway")


def test_a_gateway_that_stops_is_counted_no_more(valkey: ValkeyServer) -> None:
    async def work() -> None:
        one, two = Gateways(valkey.url, "one"), Gateways(valkey.url, "two")
        await one.beat()
        await two.beat()
        assert two.alive == 2
        await one.close()
        await two.beat()
        assert two.alive == 1
        await two.close()

    asyncio.run(work())
    with valkey.client() as client:
        assert client.exists(GATEWAYS) == 0
