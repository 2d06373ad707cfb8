"""Tiers that are slow, full, frozen, killed or lying: every answer is right, and the cache comes back.

Each test ends with settled books (see conftest) and, where it broke something, with a later hit.
"""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis

from cacheengine.plan import DISK, REDIS
from loadtests.throttle import Throttle
from tests.faults.liar import HANG_UP, Liar
from tests.faults.rig import MiniEngine, Weather, disk_tier, on_both, on_disk, on_redis, prompt

pytestmark = pytest.mark.e2e  # a minute of real faults


SLOTS = 24
FULL = 4 * 64  # tokens in the full chunks of a prompt; its tail may come on top
fresh = count(100)  # prompts nobody asked before


def comes_back(engine: MiniEngine, tier: str) -> None:
    """Without a restart, something new is stored below and read again.  pytest-timeout bounds it."""
    while True:
        new = prompt(next(fresh))
        engine.serve(new)
        engine.settle()
        for _ in range(engine.host // 4 + 1):  # pushes it out of the host arena
            engine.serve(prompt(next(fresh)))
        engine.settle()
        before = engine.read_from(tier)
        engine.serve(new)
        engine.settle()
        if engine.read_from(tier) > before:
            return
        time.sleep(0.02)


def stored(engine: MiniEngine, prompts: int = 3) -> list[tuple[int, ...]]:
    """Prompts that lie below, the first of them no longer in the host arena."""
    made = [prompt(next(fresh)) for _ in range(prompts)]
    for one in made:
        engine.serve(one)
        engine.settle()
    return made


# -- the disk --------------------------------------------------------------------------------------


@pytest.fixture
def weather(tmp_path: Path, keep: Any) -> Iterator[tuple[MiniEngine, Weather]]:
    """An engine over a disk with bad days, which end before the books are checked."""
    made: list[Weather] = []

    def wrap(tier: Any) -> Weather:
        made.append(Weather(tier))
        return made[0]

    engine = keep(on_disk(tmp_path, SLOTS, wrap=wrap))
    yield engine, made[0]
    made[0].gate.set()
    made[0].seconds, made[0].down = 0.0, False


def test_while_a_disk_hangs_under_a_load_other_requests_are_served(weather):
    engine, disk = weather
    first, *_ = stored(engine)
    disk.gate.clear()
    held = engine.ask(first)
    for _ in range(5):  # each needs many steps
        other = engine.ask(prompt(next(fresh)))
        while other.state != "done":
            engine.step()
    assert held.state == "loading"
    disk.gate.set()
    engine.run()
    assert held.state == "done"
    assert held.loaded > 0


def held_up(engine: MiniEngine, disk: Weather) -> None:
    """Every loader waits for the disk, so that a load from the host arena waits in their queue."""
    blocking = [engine.ask(prompt(n)) for n in (0, 1)]
    disk.gate.clear()
    while any(request.state == "waiting" for request in blocking):
        engine.step()
    assert [request.state for request in blocking] == ["loading"] * 2


@pytest.mark.parametrize("how", ["clear", "expire", "evict"])
def test_a_slot_is_not_given_away_while_a_load_waits_to_read_it(tmp_path, keep, how):
    disks: list[Weather] = []
    engine = keep(
        on_disk(tmp_path, SLOTS, wrap=lambda tier: disks.append(Weather(tier)) or disks[0], host=16)
    )
    for n in (0, 1, *range(10, 13)):  # 0 and 1 end on the disk alone
        engine.serve(prompt(n))
        engine.settle()
    held_up(engine, disks[0])
    waiting = engine.ask(prompt(12))
    engine.step()
    assert waiting.state == "loading"
    if how == "clear":
        engine.clear(tmp_path, SLOTS)
    if how == "expire":
        for _ in range(4):
            engine.store.expire(time.monotonic())
    others = [engine.ask(prompt(n)) for n in range(20, 24)]  # take every slot they can get
    while any(request.state != "done" for request in others):
        engine.step()
    assert waiting.state == "loading"
    disks[0].gate.set()
    engine.run()  # the rig compares what it got
    assert waiting.loaded > 0


@pytest.mark.parametrize("how", ["clear", "expire", "evict"])
def test_a_slot_is_not_given_away_while_a_write_waits_to_read_it(tmp_path, keep, how):
    """A frame packed from another chunk's bytes would carry the right checksum of the wrong KV."""
    disks: list[Weather] = []
    engine = on_disk(tmp_path, SLOTS, wrap=lambda tier: disks.append(Weather(tier)) or disks[0], host=8)
    disks[0].gate.clear()
    engine.serve(prompt(1))  # its write hangs
    if how == "clear":
        engine.clear(tmp_path, SLOTS)
    if how == "expire":
        for _ in range(4):
            engine.store.expire(time.monotonic())
    for n in range(20, 24):
        engine.serve(prompt(n))
    disks[0].gate.set()
    engine.settle()
    engine.close()
    engine = keep(on_disk(tmp_path, SLOTS, host=8))
    for n in (1, *range(20, 24)):
        engine.serve(prompt(n))
        engine.settle()


def test_a_slow_disk_is_only_slow(weather):
    engine, disk = weather
    prompts = stored(engine)
    disk.seconds = 0.05
    engine.serve(*prompts)
    assert engine.hits > 0


def test_a_disk_that_goes_down_and_up_again_is_used_again(weather):
    engine, disk = weather
    prompts = stored(engine)
    disk.down = True
    for _ in range(3):
        engine.serve(*prompts)
    engine.settle()
    disk.down = False
    comes_back(engine, DISK)


def test_a_disk_that_fails_between_look_up_and_load_costs_a_computation(weather):
    engine, disk = weather
    first, *_ = stored(engine)
    engine.between = lambda: setattr(disk, "down", True)
    (request,) = engine.serve(first)
    assert request.loaded == 0
    engine.between = lambda: None
    disk.down = False
    comes_back(engine, DISK)


def test_a_medium_that_takes_no_more_drops_writes_and_heals(tmp_path, keep):
    engine = keep(on_disk(tmp_path, SLOTS))
    stored(engine, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # EFBIG from the third slot on
    try:
        for n in range(6):
            engine.serve(prompt(n), prompt(n + 1))
        engine.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    comes_back(engine, DISK)


@contextmanager
def tiny_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own.  Needs root."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a really full disk, because mount says: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_drops_writes_and_heals(tmp_path):
    with tiny_disk(tmp_path / "tiny", 2 << 20) as disk:
        engine = on_disk(disk / "cache", SLOTS)
        try:
            prompts = stored(engine)
            for path in (disk / "cache").glob("*.slots"):  # its preallocated pages are given back …
                size = path.stat().st_size
                os.truncate(path, 4096)
                os.truncate(path, size)
            with pytest.raises(OSError, match="No space"):  # … and taken by somebody else
                (disk / "ballast").write_bytes(bytes(4 << 20))
            for _ in range(3):
                engine.serve(*prompts)
            engine.settle()
            assert shutil.disk_usage(disk).free == 0
            (disk / "ballast").unlink()
            comes_back(engine, DISK)
        finally:
            engine.close()


# -- Redis -----------------------------------------------------------------------------------------

e2e = pytest.mark.e2e


@e2e
@pytest.mark.parametrize("what", ["*", "*_bytes"])
def test_what_redis_evicts_between_look_up_and_load_is_computed(valkey, admin, keep, what):
    engine = keep(on_redis(valkey.unix_url))
    first, *_ = stored(engine)
    engine.between = lambda: admin.delete(*admin.keys(what))
    (request,) = engine.serve(first)
    assert request.loaded < FULL
    engine.between = lambda: None
    comes_back(engine, REDIS)


@e2e
@pytest.mark.parametrize("what", ["*_bytes", "*[0-9a-f]"])
def test_half_of_every_pair_is_a_miss_and_is_repaired(valkey, admin, keep, what):
    engine = keep(on_redis(valkey.unix_url))
    prompts = stored(engine)
    admin.delete(*admin.keys(what))
    for one in prompts:
        engine.serve(one)
    comes_back(engine, REDIS)


@contextmanager
def out_of_memory(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    admin.config_set("maxmemory", "1")
    try:
        yield
    finally:
        admin.config_set("maxmemory", "0")


@contextmanager
def replica(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    admin.replicaof("127.0.0.1", "1")
    try:
        yield
    finally:
        admin.replicaof("NO", "ONE")


@contextmanager
def frozen(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    with valkey.frozen():
        yield


@contextmanager
def dead(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    valkey.kill()
    try:
        yield
    finally:
        valkey.start()


@contextmanager
def restarted(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    valkey.restart()
    yield


@contextmanager
def paused(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    admin.client_pause(1_000, all=True)
    yield
    with valkey.client() as other:
        other.ping()  # answered when the pause is over


@contextmanager
def evicting(valkey: Any, admin: redis.Redis) -> Iterator[None]:
    """Memory for a few chunks only: everything written pushes something else out."""
    used = int(admin.info("memory")["used_memory"])
    admin.config_set("maxmemory-policy", "allkeys-lru")
    admin.config_set("maxmemory", str(used + 60_000))
    try:
        yield
    finally:
        admin.config_set("maxmemory", "0")
        admin.config_set("maxmemory-policy", "noeviction")


TROUBLES = [out_of_memory, replica, frozen, dead, restarted, paused, evicting]


@e2e
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: t.__name__)
def test_whatever_redis_does_every_answer_is_right_and_it_is_used_again(valkey, admin, keep, trouble):
    engine = keep(on_redis(valkey.url, timeout_ms=150))
    prompts = stored(engine)
    with trouble(valkey, admin):
        for _ in range(2):
            engine.serve(*prompts, prompt(next(fresh)))
        engine.settle()
    comes_back(engine, REDIS)


@e2e
@pytest.mark.parametrize("trouble", [frozen, dead, restarted, paused], ids=lambda t: t.__name__)
def test_trouble_that_comes_between_look_up_and_load_costs_a_computation(valkey, admin, keep, trouble):
    engine = keep(on_redis(valkey.url, timeout_ms=150))
    first, *_ = stored(engine)
    struck: list[None] = []
    with ExitStack() as until:
        engine.between = lambda: struck.append(until.enter_context(trouble(valkey, admin)))
        (request,) = engine.serve(first)
        engine.settle()
        assert len(struck) == 1, "not one promise: the test proves nothing"
        assert request.loaded == 0
    engine.between = lambda: None
    comes_back(engine, REDIS)


@e2e
def test_four_loads_that_time_out_at_once_are_four_computations(valkey, keep):
    engine = keep(on_redis(valkey.url, timeout_ms=300, host=20, pages=300, io_threads=4))
    prompts = stored(engine, 10)[:4]  # 40 chunks went through 20 host slots
    asked = [engine.ask(one) for one in prompts]
    engine.wait_for_probes()
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        engine.step()
        assert [request.state for request in asked] == ["loading"] * 4
        engine.run()
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert [request.loaded for request in asked] == [0] * 4
    comes_back(engine, REDIS)


YES = {"EXISTS": b":1\r\n", "EXPIRE": b":1\r\n", "STRLEN": b":8832\r\n"}
LIES = {
    "loading": {"": b"-LOADING Redis is loading the dataset in memory\r\n"},
    "moved": {"": b"-MOVED 1 127.0.0.1:2\r\n"},
    "cluster down": {"": b"-CLUSTERDOWN The cluster is down\r\n"},
    "no permission": {"": b"-NOPERM this user has no permissions\r\n"},
    "busy": {"": b"-BUSY Redis is busy running a script\r\n"},
    "nil": {"": b"$-1\r\n"},
    "promises, then nil": {**YES, "": b"$-1\r\n"},
    "promises, then an error": {**YES, "": b"-MISCONF Errors writing to the AOF file\r\n"},
    "promises, then little": {**YES, "": b"$5\r\nwrong\r\n"},
    "promises, then a frame of zeros": {**YES, "": b"$8832\r\n" + bytes(8832) + b"\r\n"},
    "promises, then half a frame and silence": {**YES, "": b"$8832\r\n" + bytes(4000)},
    "promises, then hangs up": {**YES, "": HANG_UP},
    "yes to everything": {"": b":1\r\n"},
    "another protocol": {"": b"HTTP/1.1 400 Bad Request\r\n\r\n"},
    "endless line": {"": b"x" * 5_000},
    "silence": {"": b""},
    "hangs up": {"": HANG_UP},
}


@e2e
@pytest.mark.parametrize("lie", LIES)
def test_no_lie_of_a_server_reaches_a_page_and_the_truth_is_used_again(valkey, keep, lie):
    with Liar(("127.0.0.1", valkey.port)) as wire:
        engine = keep(on_redis(wire.url, timeout_ms=150))
        prompts = stored(engine)
        wire.tell(LIES[lie])
        for _ in range(2):
            engine.serve(*prompts, prompt(next(fresh)))
        engine.settle()
        wire.tell(None)
        comes_back(engine, REDIS)


@e2e
def test_while_a_load_crawls_from_a_slow_redis_others_are_served(valkey, keep):
    with Throttle(("127.0.0.1", valkey.port)) as wire:
        engine = keep(on_redis(wire.url, timeout_ms=5000))
        first, *_ = stored(engine)
        engine.between = lambda: setattr(wire, "rate", 30_000.0)  # a second for the four chunks
        held = engine.ask(first)
        while held.state == "waiting":
            engine.step()
        assert held.state == "loading"
        wait = engine.ask(prompt(next(fresh), chunks=1))
        engine.between = lambda: None
        while wait.state != "done":
            engine.step()
        assert held.state == "loading"
        engine.run()
        assert held.loaded >= FULL
        wire.rate = float("inf")


@e2e
def test_a_redis_too_slow_for_its_deadline_is_down_and_comes_back(valkey, keep):
    with Throttle(("127.0.0.1", valkey.port)) as wire:
        engine = keep(on_redis(wire.url, timeout_ms=100))
        prompts = stored(engine)
        wire.rate = 20_000.0
        engine.serve(*prompts)
        engine.settle()
        wire.rate = float("inf")
        comes_back(engine, REDIS)


# -- both ------------------------------------------------------------------------------------------


@e2e
def test_with_both_tiers_in_trouble_at_once_everything_is_computed(tmp_path, valkey, keep):
    engine = keep(on_both(tmp_path, valkey.url, timeout_ms=150))
    prompts = stored(engine)
    (path,) = tmp_path.glob("*.slots")
    size = path.stat().st_size
    os.truncate(path, 0)
    with valkey.frozen():
        asked = engine.serve(*prompts)
        engine.settle()
    assert sum(request.loaded for request in asked[:1]) == 0
    os.truncate(path, size)
    comes_back(engine, DISK)


@e2e
def test_what_the_disk_lost_is_read_from_redis_by_the_next_life(tmp_path, valkey, keep):
    engine = on_both(tmp_path / "a", valkey.url)
    prompts = stored(engine)
    engine.close()
    engine = keep(on_both(tmp_path / "b", valkey.url))
    for one in prompts:
        (request,) = engine.serve(one)
        engine.settle()
        assert request.loaded >= FULL
    assert engine.read_from(REDIS) > 0


def test_what_was_cleared_does_not_come_back_with_the_next_start(tmp_path, keep):
    engine = on_disk(tmp_path, SLOTS)
    prompts = stored(engine)
    half_way = engine.ask(prompts[0])  # a load is under way, and then a save
    while half_way.state == "waiting":
        engine.step()
    engine.clear(tmp_path, SLOTS)
    (after,) = engine.serve(prompts[1])
    assert after.loaded == 0
    engine.clear(tmp_path, SLOTS)
    engine.settle()
    engine.close()
    engine = keep(on_disk(tmp_path, SLOTS))
    assert [request.loaded for one in prompts for request in engine.serve(one)] == [0, 0, 0]


def test_a_tenant_s_quota_survives_a_restart(tmp_path):
    engine = on_disk(tmp_path, SLOTS)
    engine.ask(prompt(1), salt="a")
    engine.settle()
    engine.close()
    engine = on_disk(tmp_path, SLOTS, share=0.5, host=12)
    try:
        engine.ask(prompt(1), salt="a")
        engine.settle()
        engine.store.clear()
        engine.store.erased(engine.store.to_erase())
        engine.store.check()
    finally:
        engine.close()


def test_a_folder_in_use_is_not_harmed_by_a_second_engine(tmp_path, keep):
    engine = keep(on_disk(tmp_path, SLOTS))
    prompts = stored(engine)
    with pytest.raises(ValueError, match="in use"):
        disk_tier(tmp_path, SLOTS)
    assert engine.serve(prompts[0])[0].loaded >= FULL
