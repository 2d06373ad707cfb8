"""The scheduler's half obeys: what is cleared is gone from the map, the index and the disk, for good."""

import mmap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cacheengine.config import CacheConfig
from cacheengine.keys import ChunkKey
from cacheengine.layout import KVLayout
from cacheengine.plan import DISK, NO_PARENT, Plan, Want
from cacheengine.tier import Ref
from cacheengine.tiers.disk import DiskTier, erase, scan
from cacheengine.wishes import Verb, make
from tests.conftest import ValkeyServer
from tests.fakes import wait_until

with warnings.catch_warnings():  # vLLM and torch warn about each other's older corners
    warnings.simplefilter("ignore")
    from cacheengine.connectors.scheduler import SchedulerHalf

LAYOUT = KVLayout(2, 16, 2048, 32, "float32", "test", {"model": "wishes"})
SCHEME = LAYOUT.scheme
KEYS = SCHEME.keys(range(32 * 4))
VLLM: Any = SimpleNamespace(
    parallel_config=SimpleNamespace(world_size=1),
    scheduler_config=SimpleNamespace(max_num_seqs=16),
    model_config=SimpleNamespace(model="/m", served_model_name="m"),
)


class Life:
    """One life of a worker: the scheduler's half, and the disk tier as its rank holds it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.where = ([folder], 1 << 20, LAYOUT.payload_bytes, SCHEME.namespace)
        self.disk = DiskTier(*self.where, LAYOUT.chunk_tokens, 0, 1)
        config = CacheConfig(
            chunk_tokens=32, host_bytes=1 << 20, disk_path=str(folder), disk_bytes=1 << 20, redis_url=url,
            worker_id="w1", worker_url="http://127.0.0.1:1",
        )  # fmt: skip
        self.half = SchedulerHalf(VLLM, LAYOUT, config)

    def save(self) -> None:
        """A prompt's four chunks are computed and kept in host memory."""
        wants = [Want(key, KEYS[i - 1] if i else NO_PARENT, KEYS[0], 2) for i, key in enumerate(KEYS)]
        with self.half._lock:
            plan = self.half.store.begin_save("r", wants)
            assert plan is not None
            self.half.store.settle(plan.id, 4)

    def begin_demote(self) -> Plan:
        with self.half._lock:
            plan = self.half.store.begin_demote(DISK, 4)
        assert plan is not None
        return plan

    def demote(self, plan: Plan) -> None:
        refs = [Ref(move.key, move.slot, move.parent, move.root) for move in plan.moves]
        assert self.disk.write(refs, [memoryview(mmap.mmap(-1, LAYOUT.payload_bytes)) for _ in refs]) == 4
        with self.half._lock:
            self.half.store.settle(plan.id, 4)

    def on_disk(self) -> set[ChunkKey]:
        return {info.key for info in scan(*self.where, 0, 1).values()}

    def check(self) -> None:
        with self.half._lock:
            self.half.store.check()

    def end(self) -> None:
        self.half.close()
        self.disk.close()


@pytest.fixture
def begin(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Callable[[], Life]]:
    lives: list[Life] = []

    def one() -> Life:
        lives.append(Life(tmp_path / "disk", valkey.url))
        return lives[-1]

    yield one
    for life in lives:
        life.end()


def say(valkey: ValkeyServer, verb: Verb, *keys: ChunkKey) -> int:
    with valkey.client() as client:
        return make(client, SCHEME.namespace.hex(), verb, keys, "me")[0]


def test_what_is_cleared_is_gone_from_the_map_and_from_the_disk(begin, valkey):
    life = begin()
    life.save()
    life.demote(life.begin_demote())
    assert life.on_disk() == set(KEYS)
    number = say(valkey, "clear")
    wait_until(lambda: life.half._wishes.obeyed.clear_epoch == number)
    assert (life.half.store.inventory(), life.on_disk()) == ([], set())
    life.check()


def test_cleared_slots_are_used_again(begin, valkey):
    life = begin()
    life.save()
    life.demote(life.begin_demote())
    number = say(valkey, "clear")
    wait_until(lambda: life.half._wishes.obeyed.clear_epoch == number)
    life.save()
    life.demote(life.begin_demote())
    assert life.on_disk() == set(KEYS)
    life.check()


def test_a_clear_that_was_said_while_the_worker_was_down_comes_before_the_first_hit(begin, valkey):
    life = begin()
    life.save()
    life.demote(life.begin_demote())
    life.end()
    say(valkey, "clear")
    again = begin()
    assert (again.half.store.inventory(), again.on_disk()) == ([], set())


def test_a_restart_after_a_clear_is_warm_with_what_came_later(begin, valkey):
    life = begin()
    number = say(valkey, "clear")
    wait_until(lambda: life.half._wishes.obeyed.clear_epoch == number)
    life.save()
    life.demote(life.begin_demote())
    life.end()
    assert len(begin().half.store.inventory()) == 4


def test_what_was_forgotten_before_a_clear_does_not_come_back_after_it(begin, valkey):
    life = begin()
    life.save()
    life.demote(life.begin_demote())
    with life.half._lock:
        life.half.store.expire(float("inf"))  # starts a round …
        life.half.store.expire(float("inf"))
    assert (life.half.store.inventory(), life.on_disk()) == ([], set(KEYS))
    number = say(valkey, "clear")
    wait_until(lambda: life.half._wishes.obeyed.clear_epoch == number)
    assert life.on_disk() == set()
    life.check()


def test_what_a_start_could_not_use_is_cleared_too(begin, valkey):
    life = begin()
    life.save()
    life.demote(life.begin_demote())
    (first,) = (slot for slot, info in scan(*life.where, 0, 1).items() if info.key == KEYS[0])
    erase(*life.where, 0, 1, [first])
    life.end()
    again = begin()
    assert (again.half.store.inventory(), again.on_disk()) == ([], set(KEYS[1:]))
    number = say(valkey, "clear")
    wait_until(lambda: again.half._wishes.obeyed.clear_epoch == number)
    assert again.on_disk() == set()
    again.check()


def test_what_was_being_written_during_a_clear_does_not_stay_on_disk(begin, valkey):
    life = begin()
    life.save()
    plan = life.begin_demote()
    number = say(valkey, "clear")
    wait_until(lambda: life.half._wishes.obeyed.clear_epoch == number)
    life.demote(plan)
    assert life.on_disk() == set(KEYS)
    wait_until(lambda: life.on_disk() == set())
    wait_until(lambda: not life.half.store.to_erase())
    life.check()


def test_pins_reach_the_store_also_after_a_restart(begin, valkey):
    life = begin()
    life.save()
    number = say(valkey, "pin", *KEYS[:3])
    wait_until(lambda: life.half._wishes.obeyed.pins_version == number)
    assert life.half.store.pinned() == 3
    life.demote(life.begin_demote())
    life.end()
    assert begin().half.store.pinned() == 3
