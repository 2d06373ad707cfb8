"""The ring the disk bench measures with reads what is there, and says what failed."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.micro.uring import Job, Ring

DEPTH = 4


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        made = Ring(DEPTH)
    except OSError as exc:
        pytest.skip(f"IO_URING NOT TESTED: this kernel or container refuses it ({exc.strerror})")
    yield made
    made.close()


def test_batch_after_batch_reads_what_is_there(ring: Ring, tmp_path: Path):
    stored = os.urandom(100 * 64)
    (tmp_path / "file").write_bytes(stored)
    memory = ctypes.create_string_buffer(DEPTH * 64)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    for start in range(0, 100, DEPTH):
        there = [(start + i) * 64 for i in range(DEPTH)]
        ring.read([Job(fd, ctypes.addressof(memory) + i * 64, 64, at) for i, at in enumerate(there)])
        assert memory.raw == stored[start * 64 : (start + DEPTH) * 64]
    os.close(fd)


def test_a_read_that_fails_or_ends_early_is_an_error(ring: Ring, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"short")
    memory = ctypes.create_string_buffer(64)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error"):
        ring.read([Job(fd, ctypes.addressof(memory), 64, 0)])
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        ring.read([Job(fd, ctypes.addressof(memory), 64, 0)])
    with pytest.raises(ValueError, match="5 reads in a ring of 4"):
        ring.read([Job(fd, ctypes.addressof(memory), 64, 0)] * 5)
