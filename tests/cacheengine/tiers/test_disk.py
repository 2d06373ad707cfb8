"""The disk tier's own promises: hard capacity, several devices, clear refusals, faults of the medium."""

import fcntl
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheengine.config import ConfigError
from cacheengine.errors import TierDown
from cacheengine.tiers.disk import DiskTier, scan, slots_in
from cacheengine.tiers.slotfile import PAGE, slot_file
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
BLOCK = 64  # bytes of a block over all layers where a test cuts chunks short


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    made = disk_tier(tmp_path)
    yield made
    made.close()


@pytest.fixture
def striped(tmp_path: Path) -> Iterator[DiskTier]:
    """Two folders, half of the slots in each."""
    made = DiskTier([tmp_path / "a", tmp_path / "b"], CAPACITY + PAGE * 2, PAYLOAD, NAMESPACE, TOKENS, 0, 1)
    yield made
    made.close()


def swap(tier: DiskTier, part: int, path: str, flags: int) -> None:
    """Put another file behind a tier's descriptor, one whose kernel side fails as a broken device does."""
    fd = os.open(path, flags)
    os.dup2(fd, tier._files[part]._fd)
    os.close(fd)


# /proc/self/mem has no page at a small offset: reading there is EIO.  /dev/full: writing is ENOSPC.
DEAD = ("/proc/self/mem", os.O_RDWR)
FULL = ("/dev/full", os.O_RDWR)


def test_the_capacity_is_hard_and_reserved_at_once(tier: DiskTier, tmp_path: Path):
    assert tier.slots == slots_in(CAPACITY, PAYLOAD) == SLOTS
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == CAPACITY
    assert slot_file(tmp_path, 0).stat().st_blocks * 512 >= PAGE + SLOTS * STRIDE
    for _ in range(3):
        tier.write(*chunks(SLOTS))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == CAPACITY


def test_a_second_worker_on_the_same_folder_is_told_which(tier: DiskTier, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"disk_path {tmp_path} is in use by another worker"):
        disk_tier(tmp_path)
    tier.write(*chunks(1))
    assert tier.prefix([ref(0)]) == 1


def test_ranks_share_a_folder(tier: DiskTier, tmp_path: Path):
    rank1 = DiskTier([tmp_path], CAPACITY, PAYLOAD, NAMESPACE, TOKENS, 1, 2)
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
    for path in (tmp_path / "file", Path("/proc/cairn")):
        with pytest.raises(ConfigError, match=f"cannot use disk_path {path}"):
            disk_tier(path)


def test_one_bad_folder_of_two_is_named_and_the_other_let_go(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot use disk_path /proc/cairn"):
        DiskTier([tmp_path, Path("/proc/cairn")], 2 * CAPACITY, PAYLOAD, NAMESPACE, TOKENS, 0, 1)
    disk_tier(tmp_path).close()


def test_a_folder_named_twice_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="names a folder twice"):
        DiskTier([tmp_path, tmp_path / "x" / ".."], 2 * CAPACITY, PAYLOAD, NAMESPACE, TOKENS, 0, 1)


def test_slots_are_dealt_over_all_folders_in_equal_shares(striped: DiskTier, tmp_path: Path):
    assert striped.slots == SLOTS
    refs, data = chunks(SLOTS)
    into = blank(SLOTS)
    assert striped.write(refs, data) == SLOTS
    assert striped.read(refs, into) == SLOTS
    assert into == data
    sizes = [slot_file(tmp_path / name, 0).stat().st_size for name in "ab"]
    assert sizes == [PAGE + SLOTS // 2 * STRIDE] * 2
    found = scan([tmp_path / "a", tmp_path / "b"], CAPACITY + PAGE * 2, PAYLOAD, NAMESPACE, 0, 1)
    assert {slot: info.key for slot, info in found.items()} == {n: key(n) for n in range(SLOTS)}


def test_folders_that_change_places_start_empty(striped: DiskTier, tmp_path: Path):
    striped.write(*chunks(SLOTS))
    assert scan([tmp_path / "b", tmp_path / "a"], CAPACITY + PAGE * 2, PAYLOAD, NAMESPACE, 0, 1) == {}
    assert scan([tmp_path / "a"], CAPACITY, PAYLOAD, NAMESPACE, 0, 1) == {}


def test_two_folders_on_one_device_are_remarked_upon(tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        DiskTier([tmp_path / "a", tmp_path / "b"], 2 * CAPACITY, PAYLOAD, NAMESPACE, TOKENS, 0, 1).close()
    assert "is a mount missing?" in caplog.text


def test_a_device_that_dies_costs_its_own_chunks_only(striped: DiskTier, caplog):
    refs, data = chunks(SLOTS)
    striped.write(refs, data)
    swap(striped, 1, *DEAD)
    into = blank(SLOTS)
    for n in range(SLOTS):
        assert striped.read([refs[n]], into[n : n + 1]) == (n + 1) % 2
        assert striped.prefix([refs[n]]) == (n + 1) % 2
    assert into[::2] == data[::2]
    assert striped.read(refs, blank(SLOTS)) == 1
    assert striped.write([refs[1]], [data[1]]) == 0
    assert striped.write([refs[2]], [data[2]]) == 1
    assert caplog.text.count("its chunks are misses") == 1


def test_a_full_device_keeps_fewer(striped: DiskTier):
    refs, data = chunks(3)
    swap(striped, 1, *FULL)
    assert striped.write(refs, data) == 1
    assert striped.stats.errors == 1


def test_what_was_read_before_a_device_went_down_is_kept(striped: DiskTier):
    refs, data = chunks(3)
    striped.write(refs, data)
    os.close(striped._files[1]._fd)
    striped._files[1]._fd = -1  # EBADF: trouble that no slot survives
    into = blank(3)
    assert striped.read(refs, into) == 1
    assert into[0] == data[0]
    assert striped.write(refs, data) == 1
    with pytest.raises(TierDown):
        striped.read(refs[1:], into[1:])
    assert (striped.stats.hits, striped.stats.bytes_read) == (1, PAYLOAD)


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


def test_the_files_are_private(tier: DiskTier, tmp_path: Path):
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.iterdir())


def test_direct_io_is_used_where_the_file_system_has_it(tier: DiskTier):
    flags = fcntl.fcntl(tier._files[0]._fd, fcntl.F_GETFL)
    assert bool(flags & os.O_DIRECT) == tier.direct


@pytest.mark.parametrize("size", [100, PAGE, PAGE + 1, 3 * PAGE])
def test_payloads_of_any_length_fit(tmp_path: Path, size: int):
    tier = DiskTier([tmp_path], 1 << 20, size, NAMESPACE, TOKENS, 0, 1)
    into = buffer(size)
    assert tier.write([ref(0)], [payload(0, size)]) == 1
    assert tier.read([ref(0)], [into]) == 1
    assert into == payload(0, size)
    tier.close()


@pytest.mark.parametrize("size", [BLOCK, PAGE - BLOCK, PAGE, PAGE + BLOCK, 3 * PAGE, PAYLOAD])
def test_a_short_chunk_takes_its_own_length_through_a_restart(tmp_path: Path, size: int):
    tier = disk_tier(tmp_path)
    assert tier.write([ref(0)], [payload(9)]) == 1  # what lay in the slot before was longer
    assert tier.write([ref(0)], [payload(0, size)]) == 1
    assert tier.stats.bytes_written == PAYLOAD + size
    for _ in range(2):
        into = buffer(size)
        assert tier.prefix([ref(0)]) == 1
        assert tier.read([ref(0)], [into]) == 1
        assert into == payload(0, size)
        tier.close()
        (info,) = scan([tmp_path], CAPACITY, PAYLOAD, NAMESPACE, 0, 1).values()
        assert (info.length, info.tokens) == (size, TOKENS * size // PAYLOAD)
        tier = disk_tier(tmp_path)
    tier.close()


@pytest.mark.parametrize(("stored", "asked"), [(PAYLOAD, BLOCK), (BLOCK, PAYLOAD), (PAGE, PAGE - BLOCK)])
def test_a_chunk_of_another_length_is_a_counted_miss(tier: DiskTier, stored: int, asked: int):
    tier.write([ref(0)], [payload(0, stored)])
    assert tier.read([ref(0)], [buffer(asked)]) == 0
    assert tier.stats.bad_frames == 1
    assert tier.prefix([ref(0)]) == 0


def test_an_empty_buffer_is_a_bug(tier: DiskTier):
    with pytest.raises(ValueError, match="buffer of 0 bytes"):
        tier.write([ref(0)], [memoryview(b"")])


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


ON_A_MOUNT = """
import sys
import threading
from pathlib import Path
from cacheengine.config import ConfigError
from tests.cacheengine.tiers.kit import blank, chunks, disk_tier
try:
    tier = disk_tier(Path(sys.argv[1]))
except ConfigError as exc:
    sys.exit(str(exc))
refs, data = chunks(8)
assert tier.write(refs, data) == 8
into = blank(8)
assert tier.read(refs, into) == 8 and into == data
tier.close()
again = disk_tier(Path(sys.argv[1]))
assert again.prefix(refs) == 8
print("direct" if again.direct else "page cache", len(list(Path(sys.argv[1]).iterdir())))
"""


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("ramfs", "rw", "page cache 2"),  # the one file system that refuses O_DIRECT everywhere
        ("tmpfs", "size=64k", "has no room for 167936 bytes"),
        ("tmpfs", "size=168k", " 1"),  # room for the slots, none for the header copies
        ("tmpfs", "ro", "cannot use disk_path"),
    ],
)
def test_on_a_mount_of_its_own(tmp_path: Path, kind: str, options: str, said: str):
    here = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*here, "true"], capture_output=True).returncode:
        pytest.skip("MOUNTS NOT TESTED: this machine grants no user namespaces")
    mount = f'mount -t {kind} -o {options} none "$1" && exec "$2" -c "$3" "$1"'
    ran = subprocess.run(
        [*here, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, ON_A_MOUNT],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert said in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_read_that_no_thread_could_start_never_comes_later(tier: DiskTier):
    refs, data = chunks(4)
    for one, view in zip(refs, data, strict=True):  # one at a time needs no thread
        assert tier.write([one], [view]) == 1
    given_up, into = blank(2), blank(4)
    usual = threading.stack_size(1 << 46)  # no address space holds such a stack
    try:
        with pytest.raises(TierDown, match="can't start new thread"):
            tier.read(refs[:2], given_up)
    finally:
        threading.stack_size(usual)
    assert tier.read(refs, into) == 4
    assert into == data
    assert given_up == blank(2)
