"""The disk tier's own promises: warm restarts, hard capacity, only the truth from a damaged file."""

import fcntl
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheengine.config import ConfigError
from cacheengine.frame import FrameInfo
from cacheengine.keys import Namespace, digest
from cacheengine.tiers.disk import PAGE, DiskTier, scan, slot_file, slots_in
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
STRIDE = PAGE + 4 * PAGE  # header page, ragged payload rounded up
OTHER = Namespace(digest(b"another model"))


def found(path: Path, capacity: int = CAPACITY, namespace: Namespace = NAMESPACE) -> dict[int, FrameInfo]:
    return scan(path, capacity, PAYLOAD, namespace, 0, 1)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    made = disk_tier(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed slot file with a chunk in every slot; tests damage copies of it."""
    path = tmp_path_factory.mktemp("full")
    tier = disk_tier(path)
    assert tier.write(*chunks(SLOTS)) == SLOTS
    tier.close()
    return path


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
    refs, data = chunks(3)
    tier.write(refs, data)
    tier.drop(refs[2:])
    claims = {slot: (info.key, info.parent, info.root) for slot, info in found(tmp_path).items()}
    assert claims == {0: (key(0), b"", key(0)), 1: (key(1), key(0), key(0))}


def test_a_scan_of_nothing_or_of_something_else_finds_nothing(full: Path, tmp_path: Path):
    assert len(found(full)) == SLOTS
    assert found(tmp_path / "absent") == {}
    assert found(full, namespace=OTHER) == {}
    assert found(full, capacity=CAPACITY - STRIDE) == {}
    assert scan(full, CAPACITY, PAYLOAD - 1, NAMESPACE, 0, 1) == {}
    assert scan(full, CAPACITY, PAYLOAD, NAMESPACE, 0, 2) == {}


def test_another_namespace_starts_empty_and_says_so(full: Path, tmp_path: Path, caplog):
    shutil.copytree(full, tmp_path, dirs_exist_ok=True)
    with caplog.at_level(logging.WARNING):
        tier = disk_tier(tmp_path, namespace=OTHER)
    assert "another namespace or geometry" in caplog.text
    assert tier.prefix(chunks(1)[0]) == 0
    tier.close()
    assert found(tmp_path) == {}


def test_another_capacity_starts_empty(full: Path, tmp_path: Path):
    shutil.copytree(full, tmp_path, dirs_exist_ok=True)
    tier = disk_tier(tmp_path, capacity=CAPACITY - STRIDE)
    assert (tier.slots, tier.prefix([ref(0)])) == (SLOTS - 1, 0)
    tier.close()


def test_the_capacity_is_hard_and_reserved_at_once(tier: DiskTier, tmp_path: Path):
    assert tier.slots == slots_in(CAPACITY, PAYLOAD) == SLOTS
    stat = slot_file(tmp_path, 0).stat()
    assert stat.st_size == CAPACITY
    assert stat.st_blocks * 512 >= CAPACITY
    for _ in range(3):
        tier.write(*chunks(SLOTS))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == CAPACITY


def test_a_second_worker_on_the_same_folder_is_told_which(tier: DiskTier, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"disk_path {tmp_path} is in use by another worker"):
        disk_tier(tmp_path)
    tier.write(*chunks(1))
    assert tier.prefix([ref(0)]) == 1


def test_ranks_share_a_folder(tier: DiskTier, tmp_path: Path):
    rank1 = DiskTier(tmp_path, CAPACITY, PAYLOAD, NAMESPACE, TOKENS, 1, 2)
    rank1.write([ref(0)], [payload(7)])
    tier.write([ref(0)], [payload(0)])
    into = blank(1)
    assert rank1.read([ref(0)], into) == 1
    assert into[0] == payload(7)
    rank1.close()


def test_a_capacity_below_one_chunk_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="raise disk_bytes"):
        disk_tier(tmp_path, capacity=STRIDE)


def test_a_full_disk_is_noticed_before_it_is_filled(tmp_path: Path):
    before = shutil.disk_usage(tmp_path)
    with pytest.raises(ConfigError, match=r"no room .* lower disk_bytes"):
        disk_tier(tmp_path, capacity=2 * before.total)
    assert slot_file(tmp_path, 0).stat().st_blocks == 0


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use disk_path"):
        disk_tier(tmp_path / "file")


def test_a_slot_outside_the_file_is_a_bug(tier: DiskTier):
    for slot in (-1, SLOTS):
        with pytest.raises(ValueError, match=f"slot {slot} of {SLOTS}"):
            tier.read([ref(0)._replace(slot=slot)], blank(1))


def test_a_slot_given_to_another_chunk_is_a_miss_not_damage(tier: DiskTier):
    tier.write([ref(0)], [payload(0)])
    tier.write([ref(5)._replace(slot=0)], [payload(5)])
    assert tier.prefix([ref(0)]) == 0
    assert tier.read([ref(0)], blank(1)) == 0
    assert tier.stats.bad_frames == 0
    assert tier.prefix([ref(5)._replace(slot=0)]) == 1


def test_the_file_is_private(tier: DiskTier, tmp_path: Path):
    assert slot_file(tmp_path, 0).stat().st_mode & 0o077 == 0


def test_direct_io_is_used_where_the_file_system_has_it(tier: DiskTier):
    flags = fcntl.fcntl(tier._fd, fcntl.F_GETFL)
    assert bool(flags & os.O_DIRECT) == tier.direct


@pytest.mark.parametrize("size", [100, PAGE, PAGE + 1, 3 * PAGE])
def test_payloads_of_any_length_fit(tmp_path: Path, size: int):
    tier = DiskTier(tmp_path, 1 << 20, size, NAMESPACE, TOKENS, 0, 1)
    into = buffer(size)
    assert tier.write([ref(0)], [payload(0, size)]) == 1
    assert tier.read([ref(0)], [into]) == 1
    assert into == payload(0, size)
    tier.close()


def test_a_medium_that_takes_no_more_keeps_fewer_and_heals(tier: DiskTier):
    refs, data = chunks(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE + 3 * STRIDE + PAGE, hard))  # EFBIG inside slot 3
    try:
        kept = tier.write(refs, data)
        again = tier.write(refs[4:], data[4:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (kept, again) == (3, 0)
    assert tier.prefix(refs[:3]) == 3
    assert tier.write(refs, data) == 5


def reads_only_truth(tier: DiskTier) -> int:
    """Read slot by slot; how many came back.  Anything that comes back must be what was written."""
    good = 0
    for n in range(tier.slots):
        into = blank(1)
        if tier.read([ref(n)], into):
            assert into[0] == payload(n)
            good += 1
    return good


@pytest.mark.parametrize("seed", range(200))
def test_a_flipped_bit_costs_at_most_its_own_chunk(full: Path, tmp_path: Path, seed: int):
    rng = random.Random(seed)
    shutil.copytree(full, tmp_path, dirs_exist_ok=True)
    slot, at = rng.randrange(SLOTS), rng.choice((rng.randrange(128), rng.randrange(PAGE, PAGE + PAYLOAD)))
    with slot_file(tmp_path, 0).open("r+b") as file:
        file.seek(PAGE + slot * STRIDE + at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    tier = disk_tier(tmp_path)
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
def test_a_file_cut_short_while_in_use_is_a_miss(full: Path, tmp_path: Path, seed: int):
    shutil.copytree(full, tmp_path, dirs_exist_ok=True)
    tier = disk_tier(tmp_path)
    size = random.Random(seed).randrange(CAPACITY)
    os.truncate(slot_file(tmp_path, 0), size)
    whole = max(0, (size - PAGE) // STRIDE)
    assert tier.read(chunks(SLOTS)[0], blank(SLOTS)) == whole
    assert reads_only_truth(tier) == whole
    assert tier.write(*chunks(SLOTS)) == SLOTS
    assert reads_only_truth(tier) == SLOTS
    tier.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_file_cut_short_while_closed_opens_with_what_is_left(full: Path, tmp_path: Path, seed: int):
    shutil.copytree(full, tmp_path, dirs_exist_ok=True)
    size = random.Random(seed).randrange(CAPACITY)
    os.truncate(slot_file(tmp_path, 0), size)
    tier = disk_tier(tmp_path)
    padding = STRIDE - PAGE - PAYLOAD  # zeros, which extending the file brings back
    assert reads_only_truth(tier) == max(0, (size + padding - PAGE) // STRIDE)
    assert slot_file(tmp_path, 0).stat().st_size == CAPACITY
    tier.close()


def test_a_file_of_noise_starts_empty(tmp_path: Path):
    slot_file(tmp_path, 0).write_bytes(random.Random(0).randbytes(CAPACITY))
    tier = disk_tier(tmp_path)
    assert found(tmp_path) == {}
    assert reads_only_truth(tier) == 0
    tier.close()


BIG = 1 << 20
WRITER = f"""
import sys
from pathlib import Path
from cacheengine.tiers.disk import DiskTier
from tests.cacheengine.tiers.kit import NAMESPACE, TOKENS, payload, ref
tier = DiskTier(Path(sys.argv[1]), 1 << 24, {BIG}, NAMESPACE, TOKENS, 0, 1)
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
        for _ in range(rng.randrange(1, 60)):
            child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
        claims = scan(tmp_path, 1 << 24, BIG, NAMESPACE, 0, 1)
        assert claims
        tier = DiskTier(tmp_path, 1 << 24, BIG, NAMESPACE, TOKENS, 0, 1)
        keys = {key(n): n for n in range(2 * tier.slots)}
        into = buffer(BIG)
        good = 0
        for slot, info in claims.items():
            n = keys[info.key]
            if tier.read([ref(n)._replace(slot=slot)], [into]):
                assert into == payload(n, BIG)
                good += 1
        assert good >= len(claims) - 1  # one write was under way
        tier.close()
