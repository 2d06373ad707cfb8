"""What the disk tier knows again after a restart: header copies, resizing, erasing, dying at any byte."""

import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cacheengine.errors import TierDown
from cacheengine.frame import FrameInfo
from cacheengine.keys import Namespace, digest
from cacheengine.tiers.disk import DiskTier, erase, scan
from cacheengine.tiers.heads import EMPTY, PAGE, RECORD, UNKNOWN, heads_file, state_page
from cacheengine.tiers.slotfile import slot_file
from tests.cacheengine.tiers.kit import (
    CAPACITY,
    NAMESPACE,
    PAYLOAD,
    SLOTS,
    TOKENS,
    blank,
    buffer,
    chunks,
    disk_tier,
    key,
    payload,
    ref,
)

ROOT = Path(__file__).parents[3]
PER_SLOT = 5 * PAGE + RECORD
OTHER = Namespace(digest(b"another model"))


def found(path: Path, capacity: int = CAPACITY, namespace: Namespace = NAMESPACE) -> dict[int, FrameInfo]:
    return scan([path], capacity, PAYLOAD, namespace, 0, 1)


def keys(claims: dict[int, FrameInfo]) -> dict[int, bytes]:
    return {slot: info.key for slot, info in claims.items()}


def die(tier: DiskTier) -> None:
    """What kill -9 leaves: descriptors closed, nothing said."""
    for file in tier._files:
        os.close(file._fd)
        file._fd = -1
        os.close(file._heads._fd)
        file._heads._fd = -1


def poke(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def record(path: Path, slot: int) -> bytes:
    return heads_file(path, 0).read_bytes()[PAGE + slot * RECORD :][:RECORD]


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    made = disk_tier(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed tier with a chunk in every slot; tests work on copies of it."""
    path = tmp_path_factory.mktemp("full")
    tier = disk_tier(path)
    assert tier.write(*chunks(SLOTS)) == SLOTS
    tier.close()
    return path


@pytest.fixture
def copy(full: Path, tmp_path: Path) -> Path:
    shutil.copytree(full, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_restart_is_warm(tmp_path: Path):
    refs, data = chunks(5)
    first = disk_tier(tmp_path)
    first.write(refs, data)
    first.close()
    second = disk_tier(tmp_path)
    into = blank(5)
    assert second.read(refs, into) == 5
    assert into == data
    second.close()


def test_a_scan_finds_slots_keys_and_lineage_while_the_file_is_in_use(tier: DiskTier, tmp_path: Path):
    tier.write(*chunks(2))
    claims = {slot: (info.key, info.parent, info.root) for slot, info in found(tmp_path).items()}
    assert claims == {0: (key(0), b"", key(0)), 1: (key(1), key(0), key(0))}


def test_a_scan_of_nothing_or_of_something_else_finds_nothing(full: Path, tmp_path: Path):
    assert len(found(full)) == SLOTS
    assert found(tmp_path / "absent") == {}
    assert found(full, namespace=OTHER) == {}
    assert scan([full], CAPACITY, PAYLOAD - 1, NAMESPACE, 0, 1) == {}
    assert scan([full], CAPACITY, PAYLOAD, NAMESPACE, 0, 2) == {}


def test_another_namespace_starts_empty_and_says_so(copy: Path, caplog):
    with caplog.at_level(logging.WARNING):
        tier = disk_tier(copy, namespace=OTHER)
    assert "another namespace or geometry" in caplog.text
    assert tier.prefix(chunks(1)[0]) == 0
    tier.close()
    assert found(copy) == {}
    assert found(copy, namespace=OTHER) == {}


# -- header copies -------------------------------------------------------------------------------------


def test_a_scan_reads_the_copies_and_not_the_slots(copy: Path):
    for slot in range(SLOTS):
        poke(slot_file(copy, 0), PAGE + slot * 5 * PAGE, bytes(PAGE))
    assert len(found(copy)) == SLOTS  # claims, and false ones:
    tier = disk_tier(copy)
    assert tier.read([ref(0)], blank(1)) == 0
    tier.close()


@pytest.mark.parametrize("harm", ["remove", "cut", "noise", "other file", "other boot", "flip", "zeros"])
def test_copies_that_do_not_vouch_cost_time_and_no_chunk(copy: Path, harm: str):
    heads = heads_file(copy, 0)
    if harm == "remove":
        heads.unlink()
    elif harm == "cut":
        os.truncate(heads, PAGE + 3 * RECORD + 7)
    elif harm == "noise":
        heads.write_bytes(random.Random(0).randbytes(heads.stat().st_size))
    elif harm == "other file":
        poke(heads, 0, state_page(b"8 bytes.", bytes(16)))
    elif harm == "other boot":
        made = heads.read_bytes()[8:16]
        poke(heads, 0, state_page(made, b"the boot before."))
        poke(heads, PAGE, EMPTY * SLOTS)  # what an unfinished write-back might have left
    elif harm == "flip":
        poke(heads, PAGE + 2 * RECORD + 30, b"\xff\xff")
    elif harm == "zeros":
        poke(heads, PAGE, UNKNOWN * SLOTS)
    expected = {n: key(n) for n in range(SLOTS)}
    assert keys(found(copy)) == expected
    disk_tier(copy).close()  # whoever opens it makes the copies whole
    assert keys(found(copy)) == expected
    if harm not in ("flip", "zeros"):
        assert all(record(copy, n) not in (EMPTY, UNKNOWN) for n in range(SLOTS))


def test_copies_serve_after_kill_dash_nine_and_after_an_orderly_close(tier: DiskTier, tmp_path: Path):
    tier.write(*chunks(2))
    die(tier)
    assert record(tmp_path, 0)[24:40] == key(0)
    assert keys(found(tmp_path)) == {0: key(0), 1: key(1)}
    again = disk_tier(tmp_path)
    assert again._files[0]._heads.covered == SLOTS
    again.close()
    made = heads_file(tmp_path, 0).read_bytes()[8:16]
    assert heads_file(tmp_path, 0).read_bytes()[:PAGE] == state_page(made, bytes(16))


def test_a_write_that_fails_leaves_the_question_to_the_slot(tier: DiskTier, tmp_path: Path):
    tier.write(*chunks(2))
    fd = os.open("/dev/full", os.O_RDWR)
    os.dup2(fd, tier._files[0]._fd)
    os.close(fd)
    assert tier.write([ref(5)._replace(slot=0)], [payload(5)]) == 0
    assert record(tmp_path, 0) == UNKNOWN
    assert keys(found(tmp_path)) == {0: key(0), 1: key(1)}


def test_copies_that_cannot_be_kept_are_removed_and_nothing_is_lost(tier: DiskTier, tmp_path: Path):
    tier.write(*chunks(2))
    fd = os.open("/dev/full", os.O_RDWR)
    os.dup2(fd, tier._files[0]._heads._fd)
    os.close(fd)
    refs, data = chunks(4)
    assert tier.write(refs[2:], data[2:]) == 2
    assert not heads_file(tmp_path, 0).exists()
    assert keys(found(tmp_path)) == {n: key(n) for n in range(4)}


# -- another size --------------------------------------------------------------------------------------


def test_a_smaller_tier_keeps_what_still_fits_and_gives_its_space_back(copy: Path):
    tier = disk_tier(copy, capacity=CAPACITY - 3 * PER_SLOT)
    assert tier.slots == SLOTS - 3
    assert reads_only_truth(tier) == SLOTS - 3
    assert sum(file.stat().st_size for file in copy.iterdir()) == CAPACITY - 3 * PER_SLOT
    tier.close()
    assert keys(found(copy, CAPACITY - 3 * PER_SLOT)) == {n: key(n) for n in range(SLOTS - 3)}


def test_a_larger_tier_keeps_everything(copy: Path):
    larger = CAPACITY + 3 * PER_SLOT
    assert len(found(copy, larger)) == SLOTS  # the scheduler may look before the rank has opened
    tier = disk_tier(copy, capacity=larger)
    assert tier.slots == SLOTS + 3
    assert reads_only_truth(tier) == SLOTS
    assert tier.write([ref(10)], [payload(10)]) == 1
    tier.close()
    assert keys(found(copy, larger)) == {n: key(n) for n in (*range(SLOTS), 10)}
    assert [record(copy, n) for n in (8, 9)] == [EMPTY, EMPTY]


def test_what_was_cut_off_does_not_come_back_when_the_tier_grows_again(copy: Path):
    disk_tier(copy, capacity=CAPACITY - 3 * PER_SLOT).close()
    disk_tier(copy).close()
    assert keys(found(copy)) == {n: key(n) for n in range(SLOTS - 3)}


def test_a_size_there_is_no_room_for_leaves_the_old_tier_whole(copy: Path):
    with pytest.raises(ValueError, match="lower disk_bytes"):
        disk_tier(copy, capacity=2 * shutil.disk_usage(copy).total)
    assert len(found(copy)) == SLOTS


# -- erase ---------------------------------------------------------------------------------------------


def test_what_was_erased_stays_away_though_its_owner_lives_on(tier: DiskTier, tmp_path: Path):
    refs, data = chunks(SLOTS)
    tier.write(refs, data)
    erase([tmp_path], CAPACITY, PAYLOAD, NAMESPACE, 0, 1, [1, 3])
    rest = {n: key(n) for n in range(SLOTS) if n not in (1, 3)}
    assert keys(found(tmp_path)) == rest
    assert tier.prefix(refs) == 1
    assert tier.read([refs[3]], blank(1)) == 0
    assert tier.stats.bad_frames == 0
    heads_file(tmp_path, 0).unlink()
    assert keys(found(tmp_path)) == rest
    assert tier.write([refs[3]], [data[3]]) == 1
    assert tier.prefix([refs[3]]) == 1


def test_slots_are_erased_in_every_folder(tmp_path: Path):
    where = [tmp_path / name for name in "abc"]
    args = (3 * CAPACITY, PAYLOAD, NAMESPACE)
    tier = DiskTier(where, *args, TOKENS, 0, 1)
    tier.write(*chunks(9))
    tier.close()
    erase(where, *args, 0, 1, [0, 1, 2, 4])
    assert sorted(scan(where, *args, 0, 1)) == [3, 5, 6, 7, 8]


def test_erasing_what_is_not_there_or_not_ours_changes_nothing(copy: Path, tmp_path: Path):
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    erase([tmp_path / "absent"], CAPACITY, PAYLOAD, NAMESPACE, 0, 1, [0])
    erase([copy], CAPACITY, PAYLOAD, OTHER, 0, 1, [0])
    erase([copy], CAPACITY, PAYLOAD, NAMESPACE, 0, 1, [SLOTS + 5])
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    with pytest.raises(ValueError, match="slot -1"):
        erase([copy], CAPACITY, PAYLOAD, NAMESPACE, 0, 1, [-1])


def test_what_cannot_be_erased_is_said(tmp_path: Path):
    slot_file(tmp_path, 0).mkdir()
    with pytest.raises(TierDown, match=r"cannot erase in .*rank0.slots"):
        erase([tmp_path], CAPACITY, PAYLOAD, NAMESPACE, 0, 1, [0])


# -- damage and death ----------------------------------------------------------------------------------


def reads_only_truth(tier: DiskTier) -> int:
    """Read slot by slot; how many came back.  Anything that comes back must be what was written."""
    good = 0
    for n in range(tier.slots):
        into = blank(1)
        if tier.read([ref(n)], into):
            assert into[0] == payload(n)
            good += 1
    return good


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit_costs_at_most_its_own_chunk(copy: Path, seed: int):
    rng = random.Random(seed)
    slot, at = rng.randrange(SLOTS), rng.choice((rng.randrange(128), rng.randrange(PAGE, PAGE + PAYLOAD)))
    with slot_file(copy, 0).open("r+b") as file:
        file.seek(PAGE + slot * 5 * PAGE + at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    tier = disk_tier(copy)
    into = blank(SLOTS)
    assert tier.read(chunks(SLOTS)[0], into) == slot
    assert into[:slot] == [payload(n) for n in range(slot)]
    assert tier.stats.bad_frames == 1
    assert reads_only_truth(tier) == SLOTS - 1
    assert tier.stats.bad_frames == 1  # dropped: not met twice
    assert tier.write([ref(slot)], [payload(slot)]) == 1
    assert reads_only_truth(tier) == SLOTS
    tier.close()


@pytest.mark.parametrize("seed", range(30))
def test_a_file_cut_short_while_in_use_is_a_miss(copy: Path, seed: int):
    tier = disk_tier(copy)
    size = random.Random(seed).randrange(PAGE + SLOTS * 5 * PAGE)
    os.truncate(slot_file(copy, 0), size)
    whole = max(0, (size - PAGE) // (5 * PAGE))
    assert tier.read(chunks(SLOTS)[0], blank(SLOTS)) == whole
    assert reads_only_truth(tier) == whole
    assert tier.write(*chunks(SLOTS)) == SLOTS
    assert reads_only_truth(tier) == SLOTS
    tier.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_file_cut_short_while_closed_opens_with_what_is_left(copy: Path, seed: int):
    size = random.Random(seed).randrange(PAGE + SLOTS * 5 * PAGE)
    os.truncate(slot_file(copy, 0), size)
    tier = disk_tier(copy)
    padding = 4 * PAGE - PAYLOAD  # zeros, which extending the file brings back
    whole = (size + padding - PAGE) // (5 * PAGE) if size >= PAGE else 0
    assert reads_only_truth(tier) == whole
    assert slot_file(copy, 0).stat().st_size == PAGE + SLOTS * 5 * PAGE
    tier.close()


def test_a_file_of_noise_starts_empty(tmp_path: Path):
    slot_file(tmp_path, 0).write_bytes(random.Random(0).randbytes(CAPACITY))
    tier = disk_tier(tmp_path)
    assert found(tmp_path) == {}
    assert reads_only_truth(tier) == 0
    tier.close()


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A folder on a memory file system where there is one: thousands of fsyncs would only wear the disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def harm(rng: random.Random, folder: Path) -> None:
    """One to three harms to either file: bits, runs of noise or zeros, cuts, pages that changed places."""
    for _ in range(rng.randint(1, 3)):
        victim = rng.choice([slot_file(folder, 0), slot_file(folder, 0), heads_file(folder, 0)])
        stored = bytearray(victim.read_bytes())
        at, run = rng.randrange(len(stored) + 1), rng.randrange(1, 3 * PAGE)
        match rng.choice(["flip", "flip", "noise", "zeros", "cut", "swap"]):
            case "flip" if at < len(stored):
                stored[at] ^= 1 << rng.randrange(8)
            case "noise":
                stored[at : at + run] = rng.randbytes(len(stored[at : at + run]))
            case "zeros":
                stored[at : at + run] = bytes(len(stored[at : at + run]))
            case "cut":
                del stored[at:]
            case "swap":
                a, b = (rng.randrange(1 + len(stored) // PAGE) * PAGE for _ in range(2))
                stored[a : a + PAGE], stored[b : b + PAGE] = stored[b : b + PAGE], stored[a : a + PAGE]
        victim.write_bytes(stored)


def test_a_thousand_damaged_tiers_never_tell_a_lie(full: Path):
    names = {key(n): n for n in range(SLOTS)}
    truth = [payload(n) for n in range(SLOTS)]
    intact = {file.name: file.read_bytes() for file in full.iterdir()}
    survived = 0
    with in_memory() as name:
        folder, into = Path(name), buffer()
        for seed in range(1000):
            for file, stored in intact.items():
                (folder / file).write_bytes(stored)
            harm(random.Random(seed), folder)
            claims = found(folder)
            tier = disk_tier(folder)
            for slot, info in claims.items():
                n = names[info.key]
                if tier.read([ref(n)._replace(slot=slot)], [into]):
                    assert into == truth[n], f"seed {seed}, slot {slot}"
                    survived += 1
            die(tier)
    assert 1000 * SLOTS * 0.4 < survived < 1000 * SLOTS * 0.95  # harmed, and not beyond recognition


BIG = 1 << 20
WRITER = f"""
import sys
from pathlib import Path
from cacheengine.tiers.disk import DiskTier
from tests.cacheengine.tiers.kit import NAMESPACE, TOKENS, payload, ref
tier = DiskTier([Path(sys.argv[1])], 1 << 24, {BIG}, NAMESPACE, TOKENS, 0, 1)
data = [payload(n, {BIG}) for n in range(2 * tier.slots)]
n = 0
while True:
    tier.write([ref(n % len(data))._replace(slot=n % tier.slots)], [data[n % len(data)]])
    print(n, flush=True)
    n += 1
"""


def test_kill_dash_nine_leaves_only_whole_or_refused_slots(tmp_path: Path):
    rng = random.Random(0)
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout
        last = [int(child.stdout.readline()) for _ in range(rng.randrange(1, 60))][-1]
        child.kill()
        child.wait()
        child.stdout.close()
        quick = scan([tmp_path], 1 << 24, BIG, NAMESPACE, 0, 1)
        assert len(quick) >= min(last + 1, 15)  # whatever was whole is claimed
        heads = heads_file(tmp_path, 0).read_bytes()
        heads_file(tmp_path, 0).unlink()
        slow = scan([tmp_path], 1 << 24, BIG, NAMESPACE, 0, 1)
        heads_file(tmp_path, 0).write_bytes(heads)
        assert sum(quick.get(slot) != info for slot, info in slow.items()) <= 1  # one write was under way
        tier = DiskTier([tmp_path], 1 << 24, BIG, NAMESPACE, TOKENS, 0, 1)
        names = {key(n): n for n in range(2 * tier.slots)}
        into = buffer(BIG)
        good = 0
        for slot, info in quick.items():
            n = names[info.key]
            if tier.read([ref(n)._replace(slot=slot)], [into]):
                assert into == payload(n, BIG)
                good += 1
        assert good >= len(quick) - 1
        tier.close()


class Lives(RuleBasedStateMachine):
    """A tier through writes, erasures, deaths, resizes and lost copies, against a dict."""

    slot = st.integers(0, SLOTS + 2)
    sizes = st.sampled_from([64, PAGE, PAYLOAD])

    def __init__(self) -> None:
        super().__init__()
        self.home = in_memory()
        self.folder = Path(self.home.name)
        self.capacity = CAPACITY
        self.tier = disk_tier(self.folder)
        self.model: dict[int, tuple[int, int]] = {}  # slot → chunk, length

    def teardown(self) -> None:
        self.tier.close()
        self.home.cleanup()

    @rule(slot=slot, n=st.integers(0, 20), size=sizes)
    def write(self, slot: int, n: int, size: int) -> None:
        slot %= self.tier.slots
        assert self.tier.write([ref(n)._replace(slot=slot)], [payload(n, size)]) == 1
        self.model[slot] = (n, size)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.model)))
        n, size = self.model[slot]
        into = buffer(size)
        assert self.tier.read([ref(n)._replace(slot=slot)], [into]) == 1
        assert into == payload(n, size)

    @rule(slots=st.sets(slot))
    def erase(self, slots: set[int]) -> None:
        erase([self.folder], self.capacity, PAYLOAD, NAMESPACE, 0, 1, sorted(slots))
        self.model = {slot: what for slot, what in self.model.items() if slot not in slots}

    @rule(killed=st.booleans(), slots=st.integers(1, SLOTS + 3))
    def restart(self, killed: bool, slots: int) -> None:
        if killed:
            die(self.tier)
        else:
            self.tier.close()
        self.capacity = CAPACITY + (slots - SLOTS) * PER_SLOT
        self.tier = disk_tier(self.folder, self.capacity)
        self.model = {slot: what for slot, what in self.model.items() if slot < slots}

    @rule(at=st.integers(0, PAGE + SLOTS * RECORD), value=st.integers(0, 255))
    def harm_the_copies(self, at: int, value: int) -> None:
        if heads_file(self.folder, 0).exists():  # erase() removes copies that have stopped to vouch
            poke(heads_file(self.folder, 0), at, bytes([value]))

    @rule()
    def lose_the_copies(self) -> None:
        heads_file(self.folder, 0).unlink(missing_ok=True)
        self.restart(killed=True, slots=self.tier.slots)

    @invariant()
    def a_scan_would_find_exactly_what_is_there(self) -> None:
        claims = found(self.folder, self.capacity)
        assert {slot: (info.key, info.length) for slot, info in claims.items()} == {
            slot: (key(n), size) for slot, (n, size) in self.model.items()
        }


Lives.TestCase.settings = settings(deadline=None, max_examples=30, stateful_step_count=20)
TestLives = Lives.TestCase
