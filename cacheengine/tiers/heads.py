"""Copies of a slot file's headers, side by side: a restart reads megabytes instead of visiting every slot.

One record a slot: the 128-byte frame header, or EMPTY.  A record is written just before its slot is, so no
byte at which the process dies leaves a whole chunk unlisted; a record that ran ahead of its slot is a false
claim, which the slot's own frame refuses when it is read.  Records sit in the page cache until the file is
closed: they outlive the process, not the machine.  Hence the first page, which names the boot in which they
were written, or says that the file was closed in order.  Anything else there, and any record that is neither
a sound header nor EMPTY, is no answer, and the slot's own header is read.
"""

import errno
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_64_intdigest

from cacheengine.frame import HEADER_BYTES

PAGE = 4096
RECORD = HEADER_BYTES
MAGIC = b"CRNH"
VERSION = 1
EMPTY = b"CRNE".ljust(RECORD, b"\0")
UNKNOWN = bytes(RECORD)  # ask the slot
CLOSED = bytes(16)  # the boot of a file that was closed in order
MADE_BYTES = 8

# magic version record | id of the slot file | boot
_STATE = struct.Struct("<4sHH 8s 16s")
_SUM = struct.Struct("<Q")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def heads_file(path: Path, rank: int) -> Path:
    """The header copies that belong to one rank's slot file in `path`."""
    return path / f"rank{rank}.heads"


def heads_bytes(slots: int) -> int:
    return PAGE + slots * RECORD


def state_page(made: bytes, boot: bytes) -> bytes:
    """The first page.  `made`: the 8 bytes that name the slot file; `boot`: 16 bytes, or CLOSED."""
    body = _STATE.pack(MAGIC, VERSION, RECORD, made, boot)
    return (body + _SUM.pack(xxh3_64_intdigest(body))).ljust(PAGE, b"\0")


def boot_id() -> bytes:
    """This boot's 16 bytes; where the kernel does not tell, bytes that no later process will expect."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return os.urandom(len(CLOSED))


def records(path: Path, rank: int, made: bytes, slots: int) -> list[bytes]:
    """The records of the first `slots` slots; fewer, or none, where the file cannot vouch for more."""
    try:
        fd = os.open(heads_file(path, rank), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        if not _vouches(fd, made):
            return []
        stored = os.pread(fd, slots * RECORD, PAGE)
    except OSError:
        return []
    finally:
        os.close(fd)
    return [stored[at : at + RECORD] for at in range(0, len(stored) - RECORD + 1, RECORD)]


class Heads:
    """The writer's side.  Whatever fails here removes the file: a missing one costs a slower start, a stale
    one would hide chunks.  Threads may call note() together."""

    def __init__(self, path: Path, rank: int, made: bytes, slots: int) -> None:
        """Open or create; `covered` tells how many slots the file vouches for.  vouch() must follow."""
        self._file, self._made, self._slots = heads_file(path, rank), made, slots
        self._fd = -1  # stays open until close(): another thread may be about to write
        self._live = True
        self.covered = 0
        try:
            self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _vouches(self._fd, made):
                self.covered = min(max(0, os.fstat(self._fd).st_size - PAGE) // RECORD, slots)
            else:
                os.ftruncate(self._fd, 0)
        except OSError:
            self.abandon()

    def vouch(self, missing: Iterable[bytes]) -> None:
        """Take the records of the slots from `covered` on, and stand by all of them from now on."""
        if not self._live:
            return
        try:
            size = heads_bytes(self._slots)
            os.ftruncate(self._fd, min(size, os.fstat(self._fd).st_size))
            os.posix_fallocate(self._fd, 0, size)
            _write_all(self._fd, b"".join(missing), PAGE + self.covered * RECORD)
            state = state_page(self._made, boot_id())
            if os.pread(self._fd, PAGE, 0) != state:
                # on the medium before any slot changes: after a power cut an older page must not speak
                _write_all(self._fd, state, 0)
                os.fsync(self._fd)
        except OSError:
            self.abandon()

    def note(self, slot: int, record: bytes) -> None:
        if self._live:
            try:
                _write_all(self._fd, record, PAGE + slot * RECORD)
            except OSError:
                self.abandon()

    def sync(self) -> None:
        """What was noted is on the medium, or the file is gone."""
        if self._live:
            try:
                os.fsync(self._fd)
            except OSError:
                self.abandon()

    def abandon(self) -> None:
        """Remove the file; later calls do nothing."""
        self._live = False
        with suppress(OSError):
            self._file.unlink()

    def close(self, in_order: bool) -> None:
        """`in_order`: every slot is on the medium, so the records may be believed in any later boot."""
        if in_order:
            self.sync()
        with suppress(OSError):
            if in_order and self._live:
                _write_all(self._fd, state_page(self._made, CLOSED), 0)
                os.fsync(self._fd)
        self._live = False
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _vouches(fd: int, made: bytes) -> bool:
    """Whether the records are of somebody who saw every change to this slot file.  Raises OSError."""
    return os.pread(fd, PAGE, 0) in (state_page(made, boot_id()), state_page(made, CLOSED))


def _write_all(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
