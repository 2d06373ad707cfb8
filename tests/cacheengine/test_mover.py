"""The hands: every plan is carried out to the byte, and every plan is reported, whatever the tiers do."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cacheengine.arena import Arena
from cacheengine.errors import TierDown
from cacheengine.keys import ChunkKey
from cacheengine.mover import Mover, Outcome
from cacheengine.ops import Paged
from cacheengine.plan import DISK, GONE, HOST, SKIP, Move, Plan, Report
from cacheengine.tier import NullTier, Ref

LAYERS, BLOCKS, PAGE = 3, 40, 512
CHUNK_BLOCKS = 2
PAYLOAD = LAYERS * CHUNK_BLOCKS * PAGE


class Shelf(NullTier):
    """Keeps payloads in a dict; can be told to fail, to lose, or to wait."""

    name = DISK

    def __init__(self) -> None:
        self.held: dict[ChunkKey, bytes] = {}
        self.down, self.gate = False, threading.Event()
        self.gate.set()

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        self.gate.wait(10)
        if self.down:
            raise TierDown(self.name)
        for i, (ref, view) in enumerate(zip(refs, into, strict=True)):
            if ref.key not in self.held:
                return i
            view[:] = self.held[ref.key]
        return len(refs)

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        self.gate.wait(10)
        if self.down:
            raise TierDown(self.name)
        self.held |= {ref.key: bytes(view) for ref, view in zip(refs, data, strict=True)}
        return len(refs)


class Rig:
    def __init__(self, cores: frozenset[int] = frozenset()) -> None:
        self.pages = torch.randint(0, 256, (LAYERS, BLOCKS, PAGE), dtype=torch.uint8)
        self.shelf, self.arena = Shelf(), Arena(16, PAYLOAD)
        self.mover = Mover(
            Paged.of(list(self.pages)), self.arena, {DISK: self.shelf},
            io_threads=2, cores=cores, verify_loads=True,
        )  # fmt: skip
        self.seen = Outcome()

    def reports(self, count: int) -> list[Report]:
        """Everything reported once `count` reports are in."""
        until = time.monotonic() + 10
        while len(self.seen.reports) < count:
            assert time.monotonic() < until, f"only {self.seen.reports}"
            outcome = self.mover.poll()
            self.seen.reports += outcome.reports
            self.seen.loaded |= outcome.loaded
            self.seen.bad_blocks |= outcome.bad_blocks
            self.seen.timings += outcome.timings
            self.seen.verify_failures += outcome.verify_failures
            time.sleep(0.002)
        return self.seen.reports


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.shelf.gate.set()
    rig.mover.close()


def key(n: int) -> ChunkKey:
    return ChunkKey(n.to_bytes(16, "little"))


def move(n: int, blocks: tuple[int, ...], tier: str = HOST) -> Move:
    return Move(key(n), key(n - 1), key(0), len(blocks), host=n, blocks=blocks, tier=tier, slot=n)


def saving(plan_id: int, *moves: Move) -> Plan:
    return Plan(plan_id, "save", moves)


def writing(plan_id: int, *moves: Move) -> Plan:
    return Plan(plan_id, "demote", tuple(move._replace(blocks=(), tier=DISK) for move in moves))


def test_what_was_saved_is_what_is_loaded_elsewhere(rig):
    rig.mover.save([saving(1, move(1, (3, 9)), move(2, (0, 7)))])
    assert rig.reports(1) == [Report(1, 2)]
    rig.mover.load(Plan(2, "load", (move(1, (20, 21)), move(2, (22, 23))), "b"))
    assert rig.reports(2)[-1] == Report(2, 2)
    assert rig.seen.loaded == {"b"}
    assert torch.equal(rig.pages[:, [20, 21, 22, 23]], rig.pages[:, [3, 9, 0, 7]])
    assert (rig.seen.bad_blocks, rig.seen.verify_failures) == (set(), 0)


def test_a_tail_is_moved_in_its_own_length(rig):
    rig.mover.save([saving(1, move(1, (3, 9)), move(2, (5,)))])
    rig.mover.demote(writing(2, move(2, (5,))))
    rig.reports(2)
    assert len(rig.shelf.held[key(2)]) == PAYLOAD // 2
    rig.mover.load(Plan(3, "load", (move(1, (20, 21)), move(2, (22,), DISK)._replace(host=6)), "b"))
    assert rig.reports(3)[-1] == Report(3, 2)
    assert torch.equal(rig.pages[:, [20, 21, 22]], rig.pages[:, [3, 9, 5]])
    assert rig.seen.verify_failures == 0


def test_a_chunk_from_disk_lands_in_its_host_slot_and_in_its_blocks(rig):
    rig.mover.save([saving(1, move(1, (3, 9)))])
    rig.mover.demote(writing(2, move(1, (3, 9))))
    assert rig.reports(2)[-1] == Report(2, 1)
    rig.mover.load(Plan(3, "load", (move(1, (20, 21), DISK)._replace(host=5),), "b"))
    rig.reports(3)
    assert bytes(rig.arena.view(5)) == rig.shelf.held[key(1)]
    assert torch.equal(rig.pages[:, [20, 21]], rig.pages[:, [3, 9]])


def test_blocks_the_device_has_are_left_alone(rig):
    rig.mover.save([saving(1, move(1, (3, 9)))])
    before = rig.pages.clone()
    rig.mover.load(Plan(2, "load", (move(1, (SKIP, 21)),), "b"))
    rig.reports(2)
    assert torch.equal(rig.pages[:, 21], before[:, 9])
    before[:, 21] = rig.pages[:, 21]
    assert torch.equal(rig.pages, before)


@pytest.mark.parametrize(("trouble", "kept"), [("lost", 5), ("down", 4), ("gone", 5)])
def test_trouble_ends_the_prefix_and_names_every_block_behind_it(rig, trouble, kept):
    tiers = [HOST] * 4 + [DISK] * 3  # 4 from the arena, then a batch from below
    moves = [move(n, (2 * n, 2 * n + 1), tier) for n, tier in zip(range(1, 8), tiers, strict=True)]
    rig.shelf.held = {key(5): bytes(PAYLOAD), key(7): bytes(PAYLOAD)}
    if trouble == "down":
        rig.shelf.down = True
    if trouble == "gone":
        moves[5] = moves[5]._replace(tier=GONE)
    rig.mover.load(Plan(1, "load", tuple(moves), "b"))
    assert rig.reports(1) == [Report(1, kept)]
    assert rig.seen.bad_blocks == {block for m in moves[kept:] for block in m.blocks}
    assert rig.seen.loaded == {"b"}


def test_a_tier_that_is_down_keeps_nothing_and_says_so(rig):
    rig.shelf.down = True
    rig.mover.demote(writing(1, move(1, (3, 9))))
    assert rig.reports(1) == [Report(1, 0)]


def test_a_load_that_no_thread_could_start_is_reported_once_and_never_comes_later(rig):
    rig.mover.save([saving(1, move(1, (3, 9)))])
    rig.reports(1)
    before = rig.pages.clone()
    usual = threading.stack_size(1 << 46)  # no address space holds such a stack
    try:
        rig.mover.load(Plan(2, "load", (move(1, (20, 21)),), "b"))
        rig.mover.demote(writing(3, move(1, (3, 9))))
    finally:
        threading.stack_size(usual)
    assert sorted(rig.reports(3)[1:]) == [Report(2, 0), Report(3, 0)]
    rig.mover.load(Plan(4, "load", (move(1, (30, 31)),), "c"))
    rig.mover.demote(writing(5, move(2, (3, 9))))
    assert sorted(rig.reports(5)[3:]) == [Report(4, 1), Report(5, 1)]
    assert torch.equal(rig.pages[:, [20, 21]], before[:, [20, 21]])
    assert set(rig.shelf.held) == {key(2)}


def test_a_page_that_differs_after_the_load_is_a_failed_load(rig):
    """All layers at one address: each overwrites the one before, as a wrong layout would."""
    rig.mover._paged = replace(rig.mover._paged, bases=(rig.mover._paged.bases[0],) * LAYERS)
    rig.arena.view(1)[:] = bytes(n % 251 for n in range(PAYLOAD))
    rig.mover.load(Plan(1, "load", (move(1, (20, 21)),), "b"))
    assert rig.reports(1) == [Report(1, 0)]
    assert (rig.seen.verify_failures, rig.seen.bad_blocks) == (1, {20, 21})


def test_closing_waits_for_what_is_under_way(rig):
    rig.mover.demote(writing(1, move(1, (3, 9))))
    rig.mover.close()
    assert rig.shelf.held


def test_cores_that_may_not_be_used_are_not_insisted_on():
    rig = Rig(cores=frozenset({1_000}))
    rig.mover.save([saving(1, move(1, (3, 9)))])
    rig.mover.load(Plan(2, "load", (move(1, (20, 21)),), "b"))
    assert Report(2, 1) in rig.reports(2)
    rig.mover.close()
