"""One device's share of the disk tier: a preallocated file of equal slots, locked by the rank that writes it.

A slot is one header page and the payload, moved in one preadv/pwritev straight from and to the arena
(O_DIRECT where the file system has it, so KV never competes with the page cache).  Nothing is fsynced while
serving: a torn slot fails its checksums and is a miss, whatever byte the process died at.  docs/format.md has
the layout; beside each file lie copies of its headers (heads.py).
"""

import errno
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from cacheengine import frame
from cacheengine.config import ConfigError
from cacheengine.errors import BadFrame
from cacheengine.frame import HEADER_BYTES, FrameInfo
from cacheengine.keys import Namespace
from cacheengine.tiers.heads import EMPTY, MADE_BYTES, PAGE, RECORD, UNKNOWN, Heads, heads_bytes, records

MAGIC = b"CRNS"
VERSION = 2
NO_HEADER = bytes(HEADER_BYTES)
# magic version page | namespace | payload_bytes slots | rank world part parts | id
_SUPERBLOCK = struct.Struct("<4sHH 16s QQ HHHH 8s")
_SUM = struct.Struct("<Q")
_THREADS = 4  # that visit slots at start and in erase
_BATCH = 1024

log = logging.getLogger(__name__)


def slot_file(path: Path, rank: int) -> Path:
    """The slot file of one rank in one of a worker's folders."""
    return path / f"rank{rank}.slots"


def slots_within(file_bytes: int, payload_bytes: int) -> int:
    """How many slots fit when slot file and header copies together may take `file_bytes`."""
    return max(0, file_bytes - PAGE - heads_bytes(0)) // (_stride(payload_bytes) + RECORD)


def pages(count: int) -> memoryview:
    """Zeroed page-aligned memory, as O_DIRECT wants it; fresh for each call, so threads share no buffer."""
    return memoryview(mmap.mmap(-1, count * PAGE))


def _stride(payload_bytes: int) -> int:
    return PAGE + -(-payload_bytes // PAGE) * PAGE


class Superblock(NamedTuple):
    """What a file says of itself beyond the geometry it was asked for."""

    slots: int
    made: bytes  # 8 random bytes: which file the header copies belong to


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a slot file is; its first page says so."""

    namespace: Namespace
    payload_bytes: int  # of a whole chunk; a slot may hold less
    slots: int
    rank: int
    world: int
    part: int = 0  # which of the tier's files this is
    parts: int = 1
    codec: str = frame.RAW  # of the payloads; not in the superblock: the namespace tells codecs apart

    @property
    def stride(self) -> int:
        return _stride(self.payload_bytes)

    @property
    def file_bytes(self) -> int:
        return PAGE + self.slots * self.stride

    def offset(self, slot: int) -> int:
        return PAGE + slot * self.stride

    def superblock(self, made: bytes) -> bytes:
        body = _SUPERBLOCK.pack(
            MAGIC, VERSION, PAGE, self.namespace, self.payload_bytes, self.slots,
            self.rank, self.world, self.part, self.parts, made,
        )  # fmt: skip
        return (body + _SUM.pack(xxh3_64_intdigest(body))).ljust(PAGE, b"\0")

    def recognise(self, page: bytes) -> Superblock | None:
        """A file of this geometry with any number of slots, or None."""
        if len(page) != PAGE:
            return None
        *_, slots, _, _, _, _, made = _SUPERBLOCK.unpack_from(page)
        same = page == replace(self, slots=slots).superblock(made)
        return Superblock(slots, made) if same else None

    def parse(self, header: bytes | memoryview) -> FrameInfo:
        """Any chunk that may lie in this file.  Raises BadFrame."""
        info = frame.parse(header, self.namespace, None, None, self.rank, self.world, self.codec)
        if not 0 < info.length <= self.payload_bytes:
            raise BadFrame(f"length {info.length} in a slot of {self.payload_bytes}")
        return info


def claims(path: Path, geometry: Geometry) -> Iterator[tuple[int, FrameInfo]]:
    """What the slots of one file claim to hold.  Takes no lock, writes nothing, raises nothing.

    From the header copies where they vouch for a slot, else from the slot.  Payloads are checked when they
    are read, so a false claim is a miss.
    """
    try:
        fd = os.open(slot_file(path, geometry.rank), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        with suppress(OSError):
            if found := geometry.recognise(os.pread(fd, PAGE, 0)):
                slots = min(found.slots, geometry.slots)
                yield from _claims(fd, geometry, records(path, geometry.rank, found.made, slots), slots)
    finally:
        os.close(fd)


def _claims(
    fd: int, geometry: Geometry, copies: Sequence[bytes], slots: int
) -> Iterator[tuple[int, FrameInfo]]:
    visit = list(range(len(copies), slots))
    for slot, record in enumerate(copies):
        if record == EMPTY:
            continue
        try:
            yield slot, geometry.parse(record)
        except BadFrame:
            visit.append(slot)
    for slot, header in zip(visit, _headers(fd, geometry, visit), strict=True):
        with suppress(BadFrame):
            yield slot, geometry.parse(header)


def _headers(fd: int, geometry: Geometry, slots: Sequence[int]) -> Iterator[bytes]:
    """The headers of these slots; zeros for one whose sector cannot be read."""
    if not slots:
        return
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    batches = [slots[i : i + _BATCH] for i in range(0, len(slots), _BATCH)]
    with ThreadPoolExecutor(_THREADS, "cairn-scan") as pool:
        for part in pool.map(lambda batch: [_header(fd, geometry, slot) for slot in batch], batches):
            yield from part
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _header(fd: int, geometry: Geometry, slot: int) -> bytes:
    try:
        return os.pread(fd, HEADER_BYTES, geometry.offset(slot))
    except OSError:
        return NO_HEADER


def erase_slots(path: Path, geometry: Geometry, slots: Sequence[int]) -> None:
    """Empty these slots of a file that another process may have open, on the medium when this returns.

    A file that is missing, or made for something else, holds none of them.  Raises OSError.
    """
    try:
        fd = os.open(slot_file(path, geometry.rank), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        found = geometry.recognise(os.pread(fd, PAGE, 0))
        if found is None:
            return
        inside = [slot for slot in slots if slot < found.slots]
        go_direct(fd)
        nothing = pages(1)
        with ThreadPoolExecutor(_THREADS, "cairn-erase") as pool:
            for _ in pool.map(lambda slot: os.pwritev(fd, [nothing], geometry.offset(slot)), inside):
                pass
        os.fdatasync(fd)
        heads = Heads(path, geometry.rank, found.made, found.slots)
        for slot in inside:
            heads.note(slot, EMPTY)
        if heads.covered:
            heads.sync()
            heads.close(in_order=False)
        else:
            heads.abandon()
    finally:
        os.close(fd)


class SlotFile:
    """The slots of one rank in one folder.  Opening takes the lock, creates what is missing, empties what
    belongs to another namespace or geometry, and keeps what still fits when only the size has changed.

    Raises ConfigError at opening when the folder is taken, unusable or too small; OSError later.
    """

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self.path, self._geometry = path, geometry
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(slot_file(path, geometry.rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"cannot use disk_path {path}: {exc.strerror}") from exc
        try:
            made, fresh = _prepare(self._fd, path, geometry)
            self._heads = Heads(path, geometry.rank, made, geometry.slots)
            self._heads.vouch(self._missing(fresh))
        except BaseException:
            os.close(self._fd)
            raise
        self.direct = go_direct(self._fd)

    def read(self, slot: int, vector: Sequence[memoryview]) -> int:
        """Bytes read from the start of a slot; fewer than asked at the end of a file cut short."""
        return os.preadv(self._fd, vector, self._geometry.offset(slot))

    def write(self, slot: int, vector: Sequence[memoryview]) -> bool:
        """Write a slot from its start, header page first; whether all of it went."""
        self._heads.note(slot, bytes(vector[0][:HEADER_BYTES]))
        whole = False
        try:
            whole = os.pwritev(self._fd, vector, self._geometry.offset(slot)) == sum(map(len, vector))
        finally:
            if not whole:
                self._heads.note(slot, UNKNOWN)
        return whole

    def clear(self, slot: int) -> None:
        os.pwritev(self._fd, [pages(1)], self._geometry.offset(slot))
        self._heads.note(slot, EMPTY)

    def close(self) -> None:
        """Let go of the file and its lock.  Later calls raise OSError."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        in_order = False
        with suppress(OSError):
            if self.direct:  # else an unknown amount of dirty pages would hold up the shutdown
                os.fsync(fd)
                in_order = True
        self._heads.close(in_order)
        os.close(fd)

    def _missing(self, fresh: bool) -> Iterable[bytes]:
        """Records for the slots that the header copies do not cover."""
        g = self._geometry
        uncovered = range(self._heads.covered, g.slots)
        if fresh:
            return [EMPTY] * len(uncovered)
        fd = os.open(slot_file(self.path, g.rank), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [_record(g, header) for header in _headers(fd, g, uncovered)]
        finally:
            os.close(fd)


def _record(geometry: Geometry, header: bytes) -> bytes:
    try:
        geometry.parse(header)
    except BadFrame:
        return EMPTY
    return header


def _prepare(fd: int, path: Path, geometry: Geometry) -> tuple[bytes, bool]:
    """Lock, recognise or start over, and reserve the space; the file's id and whether it is new."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        raise ConfigError(
            f"disk_path {path} is in use by another worker; give each worker its own worker_id or disk_path"
        ) from exc
    before: int | None = None
    try:
        page = os.pread(fd, PAGE, 0)
        found = geometry.recognise(page)
        if found is None:
            if page:
                log.warning("disk tier %s holds another namespace or geometry; starting empty", path)
            os.ftruncate(fd, 0)
        made = found.made if found else os.urandom(MADE_BYTES)
        before = os.fstat(fd).st_size
        _allocate(fd, geometry.file_bytes)
        if found is None or found.slots != geometry.slots:
            os.pwrite(fd, geometry.superblock(made), 0)
            os.fsync(fd)
        os.ftruncate(fd, geometry.file_bytes)  # a smaller tier gives its space back
    except OSError as exc:
        if before is not None:
            with suppress(OSError):
                os.ftruncate(fd, before)
        raise ConfigError(
            f"disk_path {path} has no room for {geometry.file_bytes} bytes ({exc.strerror}); lower disk_bytes"
            if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else f"cannot use disk_path {path}: {exc.strerror}"
        ) from exc
    return made, found is None


def _allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, asking first: fallocate would fill the disk before it failed.  Raises OSError."""
    missing = size - os.fstat(fd).st_blocks * 512
    room = os.fstatvfs(fd)
    if room.f_blocks and missing > room.f_bavail * room.f_frsize:  # some in-memory file systems do not tell
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(fd, 0, size)


def go_direct(fd: int) -> bool:
    """Switch the file to O_DIRECT if its file system can; say whether it did."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [pages(1)], 0)
    except OSError as exc:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        log.info("disk tier uses the page cache: no O_DIRECT here (%s)", exc.strerror)
        return False
    return True
