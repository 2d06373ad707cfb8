"""Disk tier: one preallocated file of equal slots per rank, warm again after a restart.

The engine's store decides which chunk lives in which slot; this file only moves bytes.  Each slot is one
header page and the payload, moved in one preadv/pwritev straight from and to the arena (O_DIRECT where the
file system has it, so KV never competes with the page cache).  Nothing is fsynced: a torn slot fails its
checksums and is a miss, whatever byte the process died at.  docs/format.md has the layout.
"""

import errno
import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from cacheengine import frame
from cacheengine.config import ConfigError
from cacheengine.errors import BadFrame, TierDown
from cacheengine.frame import HEADER_BYTES, FrameInfo
from cacheengine.keys import Namespace
from cacheengine.tier import Ref
from cacheengine.tiers.stats import TierStats

PAGE = 4096
MAGIC = b"CRNS"
VERSION = 1
# magic version page | namespace | payload_bytes slots | rank world
_SUPERBLOCK = struct.Struct("<4sHH 16s QQ HH 4x")
_SUM = struct.Struct("<Q")
_EMPTY = bytes(HEADER_BYTES)
# This write, or this sector, failed; other slots may well work.
_PARTIAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_SCAN_THREADS = 4
_SCAN_BATCH = 1024

log = logging.getLogger(__name__)


def slots_in(capacity_bytes: int, payload_bytes: int) -> int:
    """How many chunks a slot file of at most `capacity_bytes` holds; scheduler and ranks both ask here."""
    return max(0, (capacity_bytes - PAGE) // _stride(payload_bytes))


def slot_file(path: Path, rank: int) -> Path:
    """The slot file of one rank in a worker's folder."""
    return path / f"rank{rank}.slots"


def _stride(payload_bytes: int) -> int:
    return PAGE + -(-payload_bytes // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What a slot file is; its first page says so."""

    namespace: Namespace
    payload_bytes: int
    slots: int
    rank: int
    world: int

    @property
    def stride(self) -> int:
        return _stride(self.payload_bytes)

    @property
    def file_bytes(self) -> int:
        return PAGE + self.slots * self.stride

    def offset(self, slot: int) -> int:
        """Raises ValueError for a slot that is not in the file: that is a bug of the caller, not a miss."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        return PAGE + slot * self.stride

    def superblock(self) -> bytes:
        body = _SUPERBLOCK.pack(
            MAGIC, VERSION, PAGE, self.namespace, self.payload_bytes, self.slots, self.rank, self.world
        )
        return (body + _SUM.pack(xxh3_64_intdigest(body))).ljust(PAGE, b"\0")


def scan(
    path: Path, capacity_bytes: int, payload_bytes: int, namespace: Namespace, rank: int, world: int
) -> dict[int, FrameInfo]:
    """What the slots claim to hold, by slot number; for whoever rebuilds the map at start.

    Reads headers only (payloads are checked when they are read), takes no lock, writes nothing.  A missing
    file, or one of another namespace or geometry, holds nothing.  Two slots may claim the same key.
    """
    geometry = _Geometry(namespace, payload_bytes, slots_in(capacity_bytes, payload_bytes), rank, world)
    try:
        fd = os.open(slot_file(path, rank), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        if os.pread(fd, PAGE, 0) != geometry.superblock():
            return {}
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        batches = [
            range(i, min(i + _SCAN_BATCH, geometry.slots)) for i in range(0, geometry.slots, _SCAN_BATCH)
        ]
        with ThreadPoolExecutor(_SCAN_THREADS, "cairn-scan") as pool:
            parts = list(pool.map(lambda slots: _claims(fd, geometry, slots), batches))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return {slot: info for part in parts for slot, info in part}


def _claims(fd: int, geometry: _Geometry, slots: range) -> list[tuple[int, FrameInfo]]:
    found = []
    for slot in slots:
        with suppress(BadFrame, OSError):
            found.append((slot, _parse(os.pread(fd, HEADER_BYTES, geometry.offset(slot)), geometry)))
    return found


def _parse(header: bytes | memoryview, geometry: _Geometry) -> FrameInfo:
    return frame.parse(
        header, geometry.namespace, None, geometry.payload_bytes, geometry.rank, geometry.world
    )


class DiskTier:
    """The slots of one rank.  Safe for several threads as long as no two touch one slot, which leases ensure.

    Opening takes the file's lock, creates what is missing and empties what belongs to another namespace or
    geometry.  Raises ConfigError when the folder is taken, unusable or too small.
    """

    name = "disk"

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        payload_bytes: int,
        namespace: Namespace,
        tokens: int,
        rank: int,
        world: int,
    ) -> None:
        self.slots = slots_in(capacity_bytes, payload_bytes)
        if not self.slots:
            raise ConfigError(
                f"disk_bytes={capacity_bytes} holds no chunk of {payload_bytes} bytes; raise disk_bytes"
            )
        self.stats = TierStats()
        self._geometry = _Geometry(namespace, payload_bytes, self.slots, rank, world)
        self._tokens = tokens
        self._whole = payload_bytes // PAGE * PAGE  # the part moved without a bounce
        self._fd = _open(path, self._geometry)
        self.direct = _go_direct(self._fd)

    def prefix(self, refs: Sequence[Ref]) -> int:
        scratch = _pages(1)
        for i, ref in enumerate(refs):
            if not self._holds(ref, scratch):
                return i
        return len(refs)

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        scratch = _pages(2)
        filled = 0
        started = time.perf_counter()
        for ref, view in zip(refs, into, strict=True):
            if not self._read(ref, view, scratch):
                break
            filled += 1
        self.stats.add(
            hits=filled,
            misses=int(filled < len(refs)),
            bytes_read=filled * self._geometry.payload_bytes,
            read_seconds=time.perf_counter() - started,
        )
        return filled

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        scratch = _pages(2)
        kept = 0
        started = time.perf_counter()
        for ref, view in zip(refs, data, strict=True):
            if not self._write(ref, view, scratch):
                break
            kept += 1
        self.stats.add(
            bytes_written=kept * self._geometry.payload_bytes, write_seconds=time.perf_counter() - started
        )
        return kept

    def drop(self, refs: Sequence[Ref]) -> None:
        scratch = _pages(1)
        for ref in refs:
            if self._holds(ref, scratch):  # a slot that was given to another chunk keeps it
                self._erase(ref.slot)

    def close(self) -> None:
        """Let go of the file and its lock.  No verb may be running; later ones raise TierDown."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _holds(self, ref: Ref, scratch: memoryview) -> bool:
        if not self._get(ref.slot, [scratch]):
            return False
        try:
            return _parse(scratch[:HEADER_BYTES], self._geometry).key == ref.key
        except BadFrame:
            return False

    def _read(self, ref: Ref, view: memoryview, scratch: memoryview) -> bool:
        got = self._get(ref.slot, self._vector(view, scratch))
        header = scratch[:HEADER_BYTES]
        if not got or header == _EMPTY:
            return False
        try:
            info = _parse(header, self._geometry)
            if info.key != ref.key:
                return False  # the slot went to another chunk since
            if got != self._geometry.stride:
                raise BadFrame(f"slot of {got} bytes")
            view[self._whole :] = scratch[PAGE : PAGE + len(view) - self._whole]
            frame.verify(info, view)
        except BadFrame as exc:
            log.warning("disk tier dropped slot %d: %s", ref.slot, exc)
            self.stats.add(bad_frames=1)
            self._erase(ref.slot)
            return False
        return True

    def _write(self, ref: Ref, view: memoryview, scratch: memoryview) -> bool:
        g = self._geometry
        vector = self._vector(view, scratch)
        scratch[:HEADER_BYTES] = frame.pack(
            g.namespace, ref.key, ref.parent, ref.root, view, self._tokens, g.rank, g.world
        )
        scratch[PAGE : PAGE + len(view) - self._whole] = view[self._whole :]
        written = 0
        with self._trouble():
            written = os.pwritev(self._fd, vector, g.offset(ref.slot))
        return written == g.stride

    def _get(self, slot: int, vector: Sequence[memoryview]) -> int:
        """Bytes read from the start of a slot; 0 when its sectors cannot be read."""
        got = 0
        with self._trouble():
            got = os.preadv(self._fd, vector, self._geometry.offset(slot))
        return got

    def _erase(self, slot: int) -> None:
        with self._trouble():
            os.pwritev(self._fd, [_pages(1)], self._geometry.offset(slot))

    def _vector(self, view: memoryview, scratch: memoryview) -> list[memoryview]:
        """A slot's worth of memory: header page, payload, and a page for the payload's ragged end."""
        if len(view) != self._geometry.payload_bytes:
            raise ValueError(f"buffer of {len(view)} bytes, expected {self._geometry.payload_bytes}")
        parts = (scratch[:PAGE], view[: self._whole], scratch[PAGE:])
        needed = (True, self._whole > 0, self._whole < len(view))
        return [part for part, wanted in zip(parts, needed, strict=True) if wanted]

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """Swallow what concerns one slot or a full medium; TierDown for what nothing survives."""
        try:
            yield
        except OSError as exc:
            self.stats.add(errors=1)
            if exc.errno not in _PARTIAL:
                raise TierDown(f"disk tier: {exc.strerror}") from exc


def _pages(count: int) -> memoryview:
    """Zeroed page-aligned memory, as O_DIRECT wants it; fresh for each call, so threads share no buffer."""
    return memoryview(mmap.mmap(-1, count * PAGE))


def _open(path: Path, geometry: _Geometry) -> int:
    """The locked, preallocated file.  Raises ConfigError."""
    file = slot_file(path, geometry.rank)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot use disk_path {path}: {exc.strerror}") from exc
    try:
        _prepare(fd, path, geometry)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _prepare(fd: int, path: Path, geometry: _Geometry) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        raise ConfigError(
            f"disk_path {path} is in use by another worker; give each worker its own worker_id or disk_path"
        ) from exc
    superblock = geometry.superblock()
    found = os.pread(fd, PAGE, 0)
    fresh = found != superblock
    if fresh:
        if found:
            log.warning("disk tier %s holds another namespace or geometry; starting empty", path)
        os.ftruncate(fd, 0)
    try:
        _allocate(fd, geometry.file_bytes)
        if fresh:
            os.pwrite(fd, superblock, 0)
            os.fsync(fd)
    except OSError as exc:
        if fresh:
            os.ftruncate(fd, 0)
        raise ConfigError(
            f"disk_path {path} has no room for {geometry.file_bytes} bytes ({exc.strerror}); lower disk_bytes"
        ) from exc


def _allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, asking first: fallocate would fill the disk before it failed.  Raises OSError."""
    missing = size - os.fstat(fd).st_blocks * 512
    room = os.fstatvfs(fd)
    if missing > room.f_bavail * room.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(fd, 0, size)


def _go_direct(fd: int) -> bool:
    """Switch the file to O_DIRECT if its file system can; say whether it did."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [_pages(1)], 0)
    except OSError as exc:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        log.info("disk tier uses the page cache: no O_DIRECT here (%s)", exc.strerror)
        return False
    return True
