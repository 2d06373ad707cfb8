"""The chunk index on a real Valkey: what workers publish is what the router reads, even after trouble."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheengine.config import ConfigError
from cacheengine.errors import IndexDown
from cacheengine.index_schema import DEVICE, HOST, Depths, Entry, chunk_name, field_of, holder_of
from cacheengine.keys import ChunkKey, KeyScheme, Namespace
from tests.cacheengine.index_rig import FORK, INFO, NS, PROMPT, SCHEME, Loop, Worker, plant, wait_until
from tests.cacheengine.tiers.kit import blank, chunks, redis_tier
from tests.conftest import ValkeyServer

in_one_server = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


@pytest.fixture
def index(valkey: ValkeyServer) -> Iterator[Loop]:
    loop = Loop(valkey.unix_url, deadline_ms=2000)
    yield loop
    loop.close()


@pytest.fixture
def start(valkey: ValkeyServer) -> Iterator[Callable[..., Worker]]:
    """Start workers that are stopped at the end of the test."""
    started: list[Worker] = []

    def start_one(worker_id: str = "w1", held: list[ChunkKey] | None = None, **options: Any) -> Worker:
        worker = Worker(valkey.unix_url, replace(INFO, worker_id=worker_id), **options)
        worker.held = {key: Entry(held[0], key, HOST) for key in held} if held else {}
        started.append(worker)
        worker.writer.start()
        wait_until(lambda: worker.writer.stats.announcements > 0)
        return worker

    yield start_one
    for worker in started:
        worker.writer.close()
        assert not worker.writer._thread.is_alive()


def test_users_with_the_documented_rights_can_do_all_that_workers_and_gateways_do(valkey: ValkeyServer):
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    lines = [line.split() for line in text.splitlines() if line.startswith("ACL SETUSER")]
    assert [line[2] for line in lines] == ["cairn-worker", "cairn-gateway"]
    urls = [f"redis://{name}:PASSWORD@127.0.0.1:{valkey.port}" for name in ("cairn-worker", "cairn-gateway")]
    with valkey.client() as admin:
        for line in lines:
            admin.execute_command(*line)
    worker = Worker(urls[0])
    loop = Loop(urls[1], deadline_ms=2000)
    tier = redis_tier(urls[0])
    try:
        worker.say(PROMPT, HOST)
        worker.writer.start()
        wait_until(lambda: bool(loop.holders(PROMPT)))
        worker.writer.publish([Entry(PROMPT[0], key, 0) for key in PROMPT[6:]])
        wait_until(lambda: loop.holders(PROMPT)[worker.name].host == 6)
        assert list(loop.fleet()) == ["w1"]
        assert worker.writer.stats.errors == 0
        refs, data = chunks(3)
        assert tier.write(refs, data) == tier.prefix(refs) == tier.read(refs, blank(3)) == 3
        assert tier.stats.errors == 0
        worker.writer.close()
        assert loop.fleet() == {}
    finally:
        tier.close()
        loop.close()
        worker.writer.close()
        with valkey.client() as admin:
            admin.execute_command("ACL DELUSER", "cairn-worker", "cairn-gateway")


@pytest.mark.e2e
def test_the_index_follows_a_failover(failing_over: Any):
    worker = Worker(failing_over.url)
    worker.say(PROMPT, HOST)
    worker.writer.start()
    loop = Loop(failing_over.url, deadline_ms=2000)
    try:
        wait_until(lambda: "w1" in loop.fleet())
        failing_over.master.kill()
        wait_until(lambda: not loop.down(PROMPT) and bool(loop.holders(PROMPT)))
        assert loop.holders(PROMPT)[worker.name].host == len(PROMPT)
        with failing_over.replica.client() as promoted:
            assert promoted.role()[0] == b"master"
    finally:
        worker.writer.close()
        loop.close()


def reads(valkey: ValkeyServer) -> int:
    """How many hashes were read since the server was started, by whatever command."""
    with valkey.client() as client:
        stats = client.info("commandstats")
    return sum(
        int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("hgetall", "hmget", "hget")
    )


# the look-up script


@given(
    chunks=st.integers(1, 40),
    fleet=st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), max_size=6),
    seed=st.binary(min_size=16, max_size=16),
)
@in_one_server
def test_the_depth_of_every_tier_is_exact_for_any_prefix_closed_holdings(
    valkey: ValkeyServer, index: Loop, chunks: int, fleet: list[list[int]], seed: bytes
) -> None:
    namespace, keys = Namespace(os.urandom(16)), KeyScheme(Namespace(seed), 16).keys(range(16 * chunks))
    capped = [[min(depth, chunks) for depth in depths] for depths in fleet]
    plant(valkey, keys, {field_of(f"w{i}", 7): depths for i, depths in enumerate(capped)}, namespace)
    want = {(f"w{i}", 7): Depths(*depths) for i, depths in enumerate(capped) if any(depths)}
    assert index.holders(keys, namespace) == want


def test_a_holder_whose_tiers_lie_behind_each_other_is_seen_whole(valkey: ValkeyServer, index: Loop) -> None:
    with valkey.client() as client:
        for i, key in enumerate(PROMPT[:9]):  # device 0-2, host 1-5, disk 4-8: closed over the union only
            bits = (i < 3) * 1 | (1 <= i < 6) * 2 | (i >= 4) * 4
            client.hset(chunk_name(NS, PROMPT[0], key), field_of("w1", 7), bits)
    assert index.holders(PROMPT) == {("w1", 7): Depths(3, 6, 9, 0)}
    assert index.holders(PROMPT)["w1", 7].local == 9


def test_a_cold_prompt_costs_one_key_read(valkey: ValkeyServer, index: Loop) -> None:
    before = reads(valkey)
    assert index.holders(SCHEME.keys(range(16 * 512))) == {}
    assert reads(valkey) - before == 1


def test_the_cost_follows_the_holders_and_not_the_prompt(valkey: ValkeyServer, index: Loop) -> None:
    keys = SCHEME.keys(range(16 * 512))
    plant(valkey, keys, {field_of(f"w{i}", 7): [100 * i + 100] * 4 for i in range(3)}, NS)
    before = reads(valkey)
    assert index.holders(keys)["w2", 7] == Depths(300, 300, 300, 300)
    assert reads(valkey) - before <= 3 + 3 * (
        9 + 1
    )  # the ends, and for each change a bisection and the names


def test_of_a_front_that_very_many_hold_some_are_named_and_all_who_go_deeper(
    valkey: ValkeyServer, index: Loop
) -> None:
    fleet = {field_of(f"w{i}", 7): [0, 4, 0, 0] for i in range(600)}
    fleet |= {field_of(f"deep{i}", 7): [0, 5 + i, 0, 0] for i in range(6)}
    plant(valkey, PROMPT, fleet, NS)
    found = index.holders(PROMPT)
    assert {name[0]: held.host for name, held in found.items() if held.host > 4} == {
        f"deep{i}": 5 + i for i in range(6)
    }
    assert 250 <= len(found) <= 256 + 6
    assert {held.host for name, held in found.items() if name[0].startswith("w")} == {4}
    whole = index.holders(PROMPT[:3])  # nobody goes deeper than what all hold
    assert len(whole) == 256
    assert set(whole.values()) == {Depths(host=3)}


def test_lives_that_are_over_do_not_crowd_out_who_holds_a_front(valkey: ValkeyServer, index: Loop) -> None:
    fleet = {field_of(f"w{i}", life): [0, 4, 0, 0] for life in (9, 10, 8, 7, 6) for i in range(200)}
    fleet |= {field_of("deep", 7): [0, 6, 0, 0]}
    plant(valkey, PROMPT, fleet, NS)
    assert index.holders(PROMPT) == {
        ("deep", 7): Depths(host=6),
        **{(f"w{i}", 10): Depths(host=4) for i in range(200)},
    }


def test_of_more_than_are_named_everybody_is_at_some_time(valkey: ValkeyServer, index: Loop) -> None:
    plant(valkey, PROMPT, {field_of(f"w{i}", life): [0, 4, 0, 0] for i in range(300) for life in (1, 2)}, NS)
    found = [index.holders(PROMPT) for _ in range(60)]
    assert {len(named) for named in found} == {256}
    assert set().union(*found) == {(f"w{i}", 2) for i in range(300)}


def test_no_more_than_512_keys_are_asked_for(valkey: ValkeyServer, index: Loop) -> None:
    keys = SCHEME.keys(range(16 * 600))
    plant(valkey, keys, {field_of("w1", 7): [600, 0, 0, 0]}, NS)
    assert index.holders(keys) == {("w1", 7): Depths(512)}


def test_no_keys_no_question(index: Loop) -> None:
    assert index.holders([]) == {}


# writers and a reader

Step = tuple[int, int, list[ChunkKey], int]  # worker, tier bit, prompt, new depth of that tier


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 1), st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1]), st.integers(0, 12)
        ),
        max_size=25,
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_the_reader_agrees_with_a_model_after_any_interleaving(
    two_workers: list[Worker], index: Loop, steps: list[tuple[int, int, int, int]]
) -> None:
    scheme = KeyScheme(Namespace(os.urandom(16)), 16)  # fresh keys, so examples cannot meet
    prompts = [scheme.keys(range(192)), scheme.keys([*range(80), *range(900, 1012)])]
    model: list[dict[tuple[int, int], int]] = [{}, {}]  # worker → (tier, prompt) → leading chunks

    def bits(worker: int, key: ChunkKey) -> int:
        return sum(
            tier
            for tier in (1, 2, 4, 8)
            if any(key in keys[: model[worker].get((tier, p), 0)] for p, keys in enumerate(prompts))
        )

    for worker, tier, prompt, depth in steps:
        before = {key: bits(worker, key) for keys in prompts for key in keys}
        model[worker][tier, prompt] = depth
        two_workers[worker].writer.publish(
            [
                Entry(prompts[0][0], key, now)
                for key, old in before.items()
                if (now := bits(worker, key)) != old
            ]
        )
    for keys in prompts:
        want = {}
        for w, worker in enumerate(two_workers):
            depths = [sum(bool(bits(w, key) & tier) for key in keys) for tier in (1, 2, 4, 8)]
            if any(depths):
                want[worker.name] = Depths(*depths)
        wait_until(lambda keys=keys, want=want: index.holders(keys) == want)  # type: ignore[misc]


@pytest.fixture
def two_workers(start: Callable[..., Worker]) -> list[Worker]:
    return [start("a"), start("b")]


def test_a_restart_makes_every_old_entry_another_lifes(start: Callable[..., Worker], index: Loop) -> None:
    old = start()
    old.say(PROMPT, DEVICE)
    wait_until(lambda: old.name in index.holders(PROMPT))
    new = start(held=PROMPT[:4])  # the same id; it kept four chunks
    assert new.writer.epoch > old.writer.epoch
    assert index.holders(PROMPT)[new.name] == Depths(host=4)
    assert index.fleet()["w1"].info.epoch == new.writer.epoch


def named(valkey: ValkeyServer, keys: list[ChunkKey]) -> list[set[str]]:
    """Who is named at these chunks of PROMPT, lives that are over included."""
    with valkey.client() as client:
        return [{f.decode() for f in client.hkeys(chunk_name(NS, PROMPT[0], key))} for key in keys]


def test_a_worker_that_restarts_takes_the_place_of_its_earlier_life(
    start: Callable[..., Worker], index: Loop, valkey: ValkeyServer
) -> None:
    other = start("other", held=PROMPT[:1])  # without it, what is empty is gone
    old = start(held=PROMPT)
    old.writer.close()
    new = start(held=PROMPT[:4])
    lives = [field_of(*worker.name) for worker in (old, new, other)]
    assert named(valkey, PROMPT[:4]) == [{*lives[1:]}, *[{lives[1]}] * 3]
    assert named(valkey, PROMPT[4:]) == [{lives[0]}] * 8
    new.say(PROMPT[:8], HOST)  # later too
    wait_until(lambda: index.holders(PROMPT).get(new.name) == Depths(host=8))
    assert named(valkey, PROMPT[4:]) == [{lives[1]}] * 4 + [{lives[0]}] * 4


def test_the_older_of_two_with_one_name_stands_down(
    start: Callable[..., Worker], index: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    old = start(lease=0.3)
    new = start()
    wait_until(lambda: not old.writer._thread.is_alive())
    assert "another process took worker id 'w1'" in caplog.text
    assert index.fleet()["w1"].info.epoch == new.writer.epoch


def test_epochs_rise_even_when_the_counter_and_the_clock_are_lost(
    start: Callable[..., Worker], valkey: ValkeyServer
) -> None:
    first = start()
    first.writer.close()
    with valkey.client() as client:
        client.flushall()
    second = start()
    assert second.writer.epoch > first.writer.epoch
    far = second.writer.epoch + 10_000_000  # as after a server whose clock was ahead
    second.writer.close()
    with valkey.client() as client:
        client.set(f"cairn:{NS.hex()}:epoch:w1", far)
    assert start().writer.epoch == far + 1


def test_a_flushed_redis_is_told_everything_again(
    start: Callable[..., Worker], index: Loop, valkey: ValkeyServer
) -> None:
    worker = start(lease=0.3)
    worker.say(PROMPT, HOST)
    wait_until(lambda: worker.name in index.holders(PROMPT))
    before = worker.writer.epoch
    with valkey.client() as client:
        client.flushall()
    wait_until(lambda: index.holders(PROMPT).get(worker.name) == Depths(host=12))
    wait_until(lambda: index.fleet()["w1"].info.epoch == worker.writer.epoch > before)


def test_a_redis_that_was_killed_and_came_back_empty_is_told_everything_again(
    start: Callable[..., Worker], index: Loop, valkey: ValkeyServer
) -> None:
    worker = start(lease=0.6)
    worker.say(PROMPT, HOST)
    wait_until(lambda: worker.name in index.holders(PROMPT))
    valkey.kill()
    wait_until(lambda: index.down(PROMPT))
    worker.say(FORK[5:], HOST)  # published while nobody listens
    worker.held |= {key: Entry(FORK[0], key, HOST) for key in FORK}
    valkey.start()
    wait_until(lambda: not index.down(FORK) and index.holders(FORK).get(worker.name) == Depths(host=12))
    assert index.holders(PROMPT)[worker.name] == Depths(host=12)


def test_more_changes_than_fit_start_a_new_life_from_the_inventory(
    start: Callable[..., Worker], index: Loop
) -> None:
    worker = start(max_pending=20)
    before = worker.writer.epoch
    worker.say(PROMPT, HOST)
    wait_until(lambda: worker.name in index.holders(PROMPT))
    del worker.held[PROMPT[-1]]
    flood = SCHEME.keys(range(5000, 5000 + 16 * 30))
    worker.writer.publish([Entry(PROMPT[0], PROMPT[-1], 0), *(Entry(flood[0], key, HOST) for key in flood)])
    wait_until(lambda: worker.writer.epoch > before and worker.writer.stats.announcements > 1)
    assert worker.writer.stats.overflows == 1
    assert index.holders(PROMPT)[worker.name] == Depths(host=11)  # the lost removal was made good


def test_publishing_never_waits_for_a_redis_that_is_not_there() -> None:
    worker = Worker("redis://127.0.0.1:1/0", max_pending=100)
    worker.writer.start()
    for _ in range(100):
        worker.say(PROMPT, HOST)
    wait_until(lambda: worker.writer.stats.errors > 1)
    worker.writer.close()
    assert not worker.writer._thread.is_alive()


def test_a_leaving_worker_gives_its_lease_back(start: Callable[..., Worker], index: Loop) -> None:
    worker = start()
    assert list(index.fleet()) == ["w1"]
    worker.writer.close()
    assert index.fleet() == {}


def test_a_callback_that_raises_costs_the_lease_and_not_the_thread(
    start: Callable[..., Worker], index: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    worker, broken = start(lease=0.3), [True]

    def heartbeat() -> dict[str, float]:
        if broken:
            raise ZeroDivisionError("a bug")
        return {"running": 4}

    worker.writer._heartbeat = heartbeat
    wait_until(lambda: index.fleet() == {})
    broken.clear()
    wait_until(lambda: "w1" in index.fleet())
    assert index.fleet()["w1"].beat["running"] == "4"
    assert "ZeroDivisionError" in caplog.text


def test_fields_of_the_dead_are_swept_by_whoever_holds_the_same_chunks(
    start: Callable[..., Worker], index: Loop, valkey: ValkeyServer
) -> None:
    alive = start("alive", held=PROMPT)
    young = alive.writer.epoch + 5  # a life that may still be announcing itself
    plant(valkey, PROMPT, {"dead@7": [12] * 4, "alive@9": [12] * 4, f"young@{young}": [1] * 4}, NS)
    other = start("other", held=PROMPT, check_seconds=0.05)
    wait_until(lambda: other.writer.stats.rounds > 0)
    assert {worker for worker, _ in index.holders(PROMPT)} == {"alive", "other", "young"}
    assert ("alive", 9) not in index.holders(PROMPT)


# the fleet


def test_the_fleet_says_what_a_worker_said_about_itself(start: Callable[..., Worker], index: Loop) -> None:
    worker = start()
    lease = index.fleet()["w1"]
    assert lease.info == replace(INFO, epoch=worker.writer.epoch)
    assert lease.beat["running"] == "3"


def test_a_worker_with_requests_beats_although_its_lease_is_far_from_over(
    start: Callable[..., Worker],
) -> None:
    busy = start(lease=600)
    wait_until(lambda: busy.writer.stats.beats > 3)


def test_an_idle_worker_beats_when_it_has_computed_something(start: Callable[..., Worker]) -> None:
    idle = start(lease=600)
    idle.writer._heartbeat = lambda: {"running": 0}
    wait_until(lambda: idle.writer._next_beat > time.monotonic() + 100)
    before = idle.writer.stats.beats
    idle.say(PROMPT, 1)
    wait_until(lambda: idle.writer.stats.beats > before)


def test_a_lease_nobody_understands_is_left_out(
    start: Callable[..., Worker], index: Loop, valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    with valkey.client() as client:
        client.zadd("cairn:fleet", {f"{NS.hex()}:alien": 1, f"{NS.hex()}:gone": 1})
        client.hset(f"cairn:{NS.hex()}:worker:alien", mapping={"hello": "there"})
    assert list(index.fleet()) == ["w1"]
    assert "alien" in caplog.text


def test_a_lease_of_another_type_keeps_nobody_else_from_announcing(
    start: Callable[..., Worker], index: Loop, valkey: ValkeyServer
) -> None:
    with valkey.client() as client:
        client.zadd("cairn:fleet", {f"{NS.hex()}:alien": 1000 * int(time.time())})
        client.set(f"cairn:{NS.hex()}:worker:alien", "no hash")
    worker = start()
    wait_until(lambda: worker.writer.stats.beats > 2)
    assert worker.writer.stats.errors == 0
    assert list(index.fleet()) == ["w1"]


@pytest.mark.parametrize("worker_id", ["", "a@b", "a b", "a{b}", "a\n", "x" * 129])
def test_a_worker_id_that_redis_names_cannot_carry_is_refused(worker_id: str) -> None:
    with pytest.raises(ConfigError, match="worker_id"):
        replace(INFO, worker_id=worker_id)


def test_a_field_names_its_holder() -> None:
    assert holder_of(field_of("host.lan:8001/x", 12)) == ("host.lan:8001/x", 12)


# trouble


def test_a_frozen_redis_is_index_down_and_heals(valkey: ValkeyServer) -> None:
    index = Loop(valkey.unix_url, deadline_ms=50)
    try:
        plant(valkey, PROMPT, {"w1@7": [3, 0, 0, 0]}, NS)
        plant(valkey, FORK, {"w2@7": [9, 0, 0, 0]}, NS)
        with valkey.frozen():
            for _ in range(8):  # the later ones fail at once: three misses were enough
                with pytest.raises(IndexDown):
                    index.holders(PROMPT)
            assert not index.reader.up
        wait_until(lambda: not index.down(FORK))
        # late answers went to nobody: each question gets its own
        assert index.holders(FORK)["w2", 7] == Depths(9)
        assert index.holders(PROMPT)["w1", 7] == Depths(3)
    finally:
        index.close()


def test_a_loop_that_was_busy_past_the_deadline_still_takes_an_answer_that_came(valkey: ValkeyServer) -> None:
    index = Loop(valkey.unix_url, deadline_ms=50)
    plant(valkey, PROMPT, {"w1@7": [3, 0, 0, 0]}, NS)

    async def busy() -> dict[tuple[str, int], Depths]:
        asked = asyncio.create_task(index.reader.holders(NS, PROMPT))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the question is on its way
        time.sleep(0.1)  # somebody holds the loop: Redis answers meanwhile
        return await asked

    try:
        assert [index.run(busy())["w1", 7] for _ in range(4)] == [Depths(3)] * 4
        assert index.reader.up
    finally:
        index.close()


def test_questions_asked_at_once_get_their_own_answers(valkey: ValkeyServer, index: Loop) -> None:
    plant(valkey, PROMPT, {"w1@7": [12, 0, 0, 0]}, NS)

    async def all_at_once() -> list[dict[tuple[str, int], Depths]]:
        return await asyncio.gather(*(index.reader.holders(NS, PROMPT[:n]) for n in range(1, 13)))

    assert [held["w1", 7].device for held in index.run(all_at_once())] == list(range(1, 13))


def test_a_flushed_script_cache_is_nobodys_business(valkey: ValkeyServer, index: Loop) -> None:
    plant(valkey, PROMPT, {"w1@7": [3, 0, 0, 0]}, NS)
    with valkey.client() as client:
        client.script_flush()
    assert index.holders(PROMPT) == {("w1", 7): Depths(3)}


def test_a_reader_without_a_server_says_so_and_finds_it_later(valkey: ValkeyServer) -> None:
    valkey.kill()
    index = Loop(valkey.unix_url, deadline_ms=50)
    try:
        assert index.down(PROMPT)
        with pytest.raises(IndexDown):
            index.fleet()
        valkey.start()
        wait_until(lambda: not index.down(PROMPT))
    finally:
        index.close()
