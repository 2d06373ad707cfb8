import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cacheengine.arena import PAGE, Arena

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("slot_bytes", [1, 4095, 4096, 4097, 5_898_240])
def test_every_slot_is_page_aligned_and_exactly_as_long_as_asked(slot_bytes: int) -> None:
    arena = Arena(3, slot_bytes)
    for slot in range(3):
        assert arena.address(slot) % PAGE == 0
        assert len(arena.view(slot)) == slot_bytes
    assert arena.nbytes == 3 * arena.stride >= 3 * slot_bytes
    arena.close()


def test_views_and_addresses_are_the_same_memory() -> None:
    arena = Arena(2, 5000)
    arena.view(1)[:] = b"\xee" * 5000
    assert ctypes.string_at(arena.address(1), 5000) == b"\xee" * 5000
    ctypes.memset(arena.address(0), 0x11, 5000)
    assert arena.view(0) == b"\x11" * 5000
    assert arena.view(1) == b"\xee" * 5000
    arena.close()


def test_a_full_slot_does_not_reach_its_neighbours() -> None:
    arena = Arena(3, 4097)
    for slot in (0, 2):
        arena.view(slot)[:] = b"\xa5" * 4097
    arena.view(1)[:] = b"\xff" * 4097
    assert arena.view(0) == arena.view(2) == b"\xa5" * 4097
    arena.close()


@pytest.mark.parametrize("slot", [-1, 4, 1 << 40])
def test_a_slot_that_is_not_there_is_an_index_error(slot: int) -> None:
    arena = Arena(4, 4096)
    with pytest.raises(IndexError, match="not in an arena of 4"):
        arena.address(slot)
    with pytest.raises(IndexError, match="not in an arena of 4"):
        arena.view(slot)
    arena.close()


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, 4096), (4, 0), (-1, 4096)])
def test_an_empty_arena_is_refused(slots: int, slot_bytes: int) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        Arena(slots, slot_bytes)


def test_more_than_the_address_space_is_an_os_error() -> None:
    with pytest.raises((OSError, OverflowError)):
        Arena(1 << 40, 1 << 20)


def test_memory_is_taken_at_first_touch_and_not_before() -> None:
    arena = Arena(1 << 10, 1 << 24)  # 16 GiB, more than a small machine has free
    arena.view(1023)[-1] = 1
    assert arena.view(1023)[-1] == 1
    arena.close()


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_populating_takes_the_memory_and_changes_nothing() -> None:
    arena = Arena(4, 1 << 22)
    arena.view(1)[:3] = b"abc"
    able = [arena.populate(slot) for slot in range(4)]
    assert len(set(able)) == 1  # a kernel can or cannot
    assert arena.view(1)[:4] == b"abc\x00"
    if able[0]:
        before = page_faults()
        for slot in range(4):
            ctypes.memset(arena.address(slot), 1, 1 << 22)
        assert page_faults() - before < 4  # 8 huge pages or 4,096 small ones, none of them new
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.populate(0)


def test_closing_twice_is_fine_and_a_view_that_is_out_stays_readable() -> None:
    arena = Arena(2, 4096)
    view = arena.view(0)
    view[:] = b"\x07" * 4096
    arena.close()
    arena.close()
    assert view == b"\x07" * 4096
    with pytest.raises(ValueError, match="closed"):
        arena.address(0)
    with pytest.raises(ValueError, match="closed"):
        arena.view(0)


def test_the_arena_needs_no_torch() -> None:
    code = "import sys, cacheengine.arena; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
