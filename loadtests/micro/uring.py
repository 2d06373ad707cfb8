"""Reads through io_uring by raw system calls: as much as the disk bench needs.

One ring, one thread: a batch is submitted and awaited in a single call, so the kernel sees all of its reads
at once.  x86-64 and arm64 number the calls alike.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

_SETUP, _ENTER, _GETEVENTS, _READ = 425, 426, 1, 22
_SQES_AT = 0x10000000
_SQE = struct.Struct("<BBHiQQIIQ24x")  # opcode flags ioprio fd | offset address length rw_flags | user_data
_CQE = struct.Struct("<QiI")
_WORD = struct.Struct("<I")


class Job(NamedTuple):
    fd: int
    address: int
    nbytes: int
    offset: int


class _Params(ctypes.Structure):
    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 8),
        ("sq", ctypes.c_uint32 * 10),  # head tail mask entries flags dropped array …
        ("cq", ctypes.c_uint32 * 10),  # head tail mask entries overflow cqes …
    )


class Ring:
    """Raises OSError where the kernel has no io_uring or does not let this process use it."""

    def __init__(self, depth: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        params = _Params()
        self._fd = self._libc.syscall(_SETUP, ctypes.c_uint(depth), ctypes.byref(params))
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        entries, self._sq, self._cq = params.sq_entries, list(params.sq), list(params.cq)
        size = max(self._sq[6] + entries * _WORD.size, self._cq[5] + params.cq_entries * _CQE.size)
        self._ring = mmap.mmap(self._fd, size)
        self._sqes = mmap.mmap(self._fd, entries * _SQE.size, offset=_SQES_AT)
        for i in range(entries):
            _WORD.pack_into(self._ring, self._sq[6] + i * _WORD.size, i)
        self._depth, self._answers = entries, params.cq_entries

    def read(self, jobs: Sequence[Job]) -> None:
        """Returns when all are done.  Raises OSError for the first that failed, EIO for a short one."""
        if len(jobs) > self._depth:
            raise ValueError(f"{len(jobs)} reads in a ring of {self._depth}")
        tail = self._word(self._sq[1])
        for i, job in enumerate(jobs):
            at = (tail + i) % self._depth * _SQE.size
            _SQE.pack_into(self._sqes, at, _READ, 0, 0, job.fd, job.offset, job.address, job.nbytes, 0, i)
        _WORD.pack_into(self._ring, self._sq[1], (tail + len(jobs)) & 0xFFFFFFFF)
        count = ctypes.c_uint(len(jobs))
        sent = self._libc.syscall(
            _ENTER, ctypes.c_uint(self._fd), count, count, ctypes.c_uint(_GETEVENTS), None, ctypes.c_size_t(0)
        )
        if sent != len(jobs):
            raise OSError(ctypes.get_errno(), f"io_uring took {sent} of {len(jobs)} reads")
        head = self._word(self._cq[0])
        answers = [self._answer(head + i) for i in range(len(jobs))]
        _WORD.pack_into(self._ring, self._cq[0], (head + len(jobs)) & 0xFFFFFFFF)
        for i, result in answers:
            if result != jobs[i].nbytes:
                code = -result if result < 0 else 5
                raise OSError(code, os.strerror(code))

    def close(self) -> None:
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)

    def _word(self, at: int) -> int:
        return int(_WORD.unpack_from(self._ring, at)[0])

    def _answer(self, index: int) -> tuple[int, int]:
        which, result, _ = _CQE.unpack_from(self._ring, self._cq[5] + index % self._answers * _CQE.size)
        return which, result
