"""Disk tier: preallocated slots over one or several devices, warm again after a restart.

The engine's store decides which chunk lives in which slot; this tier only moves bytes.  Slots are dealt
round-robin to one file a folder (slotfile.py), so a prompt's chunks come from all devices at once, and a
device that fails costs the chunks it holds.  Checksums are computed while the next transfers are under way.
"""

import errno
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from cacheengine import frame
from cacheengine.config import ConfigError
from cacheengine.errors import BadFrame, TierDown
from cacheengine.frame import HEADER_BYTES, FrameInfo
from cacheengine.keys import Namespace
from cacheengine.pool import submit
from cacheengine.tier import Ref
from cacheengine.tiers.heads import PAGE
from cacheengine.tiers.slotfile import (
    NO_HEADER,
    Geometry,
    SlotFile,
    claims,
    erase_slots,
    pages,
    slot_file,
    slots_within,
)
from cacheengine.tiers.stats import TierStats

# This write, this sector or this device failed; other slots may well work.  Direct I/O hands the block
# layer's own verdicts through: ENODATA is a sector that cannot be read, EREMOTEIO and EILSEQ the device's no.
_PARTIAL = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ, errno.ETIMEDOUT, errno.ENOLINK),
    *(errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EUCLEAN),
}

# Transfers under way on each device while the caller verifies or frames another chunk (docs/adr/0015).
_AHEAD = 3

T = TypeVar("T")

log = logging.getLogger(__name__)


def slots_in(capacity_bytes: int, payload_bytes: int, folders: int = 1) -> int:
    """How many chunks at most `capacity_bytes` hold, in equal shares; scheduler and ranks both ask here."""
    return folders * slots_within(capacity_bytes // folders, payload_bytes)


def scan(
    paths: Sequence[Path],
    capacity_bytes: int,
    payload_bytes: int,
    namespace: Namespace,
    rank: int,
    world: int,
    codec: str = frame.RAW,
) -> dict[int, FrameInfo]:
    """What the slots claim to hold, by slot number; for whoever rebuilds the map at start.

    Reads headers only (payloads are checked when they are read), takes no lock, writes nothing.  A missing
    file, or one of another namespace or geometry, holds nothing.  Two slots may claim the same key.
    """
    files = _geometries(paths, capacity_bytes, payload_bytes, namespace, rank, world, codec)
    return {
        local * len(paths) + geometry.part: info
        for path, geometry in zip(paths, files, strict=True)
        for local, info in claims(path, geometry)
    }


def erase(
    paths: Sequence[Path],
    capacity_bytes: int,
    payload_bytes: int,
    namespace: Namespace,
    rank: int,
    world: int,
    slots: Sequence[int],
) -> None:
    """Empty `slots` for good: no later scan finds what they held.  For a process that does not own the tier.

    REQUIRES that the owner, if there is one, leaves these slots alone meanwhile.  Zeroes their headers, on
    the medium when this returns; payload bytes stay until they are overwritten.  A file that is missing or of
    another namespace or geometry holds nothing to erase.  Raises TierDown when some may still be there.
    """
    files = _geometries(paths, capacity_bytes, payload_bytes, namespace, rank, world)
    failed = []
    for path, geometry in zip(paths, files, strict=True):
        mine = [slot // len(paths) for slot in slots if slot % len(paths) == geometry.part]
        if min(mine, default=0) < 0:
            raise ValueError(f"slot {min(slots)}")
        try:
            erase_slots(path, geometry, mine)
        except OSError as exc:
            failed.append(f"{slot_file(path, rank)}: {exc.strerror}")
    if failed:
        raise TierDown(f"disk tier: cannot erase in {'; '.join(failed)}")


def _geometries(
    paths: Sequence[Path],
    capacity_bytes: int,
    payload_bytes: int,
    namespace: Namespace,
    rank: int,
    world: int,
    codec: str = frame.RAW,
) -> list[Geometry]:
    share = slots_within(capacity_bytes // len(paths), payload_bytes)
    return [
        Geometry(namespace, payload_bytes, share, rank, world, part, len(paths), codec)
        for part in range(len(paths))
    ]


class DiskTier:
    """The slots of one rank.  Safe for several threads as long as no two touch one slot, which leases ensure.

    Opening takes the files' locks, creates what is missing, empties what belongs to another namespace or
    geometry, and keeps the chunks that still fit when only `capacity_bytes` has changed.  Raises ConfigError
    when a folder is taken, named twice, unusable or too small.
    """

    name = "disk"

    def __init__(
        self,
        paths: Sequence[Path],
        capacity_bytes: int,
        payload_bytes: int,
        namespace: Namespace,
        tokens: int,
        rank: int,
        world: int,
        codec: str = frame.RAW,
    ) -> None:
        self.slots = slots_in(capacity_bytes, payload_bytes, len(paths))
        if not self.slots:
            raise ConfigError(
                f"disk_bytes={capacity_bytes} holds no chunk of {payload_bytes} bytes; raise disk_bytes"
            )
        if len({path.resolve() for path in paths}) < len(paths):
            raise ConfigError("disk_path names a folder twice; name each device once")
        self.stats = TierStats()
        files = _geometries(paths, capacity_bytes, payload_bytes, namespace, rank, world, codec)
        self._geometry = files[0]  # what the frames of all of them have in common
        self._tokens = tokens
        self._files: list[SlotFile] = []
        # apart, so that a load never waits behind writes
        self._readers = ThreadPoolExecutor(_AHEAD * len(paths), "cairn-disk-read")
        self._writers = ThreadPoolExecutor(_AHEAD * len(paths), "cairn-disk-write")
        try:
            for path, geometry in zip(paths, files, strict=True):
                self._files.append(SlotFile(path, geometry))
        except BaseException:
            self.close()
            raise
        self.direct = all(file.direct for file in self._files)
        self._troubled: set[Path] = set()
        if len({path.stat().st_dev for path in paths}) < len(paths):
            log.warning("disk_path names folders of one device: is a mount missing?  Striping gains nothing")

    def prefix(self, refs: Sequence[Ref]) -> int:
        scratch = pages(1)
        for i, ref in enumerate(refs):
            if not self._holds(ref, scratch):
                return i
        return len(refs)

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        jobs = self._jobs(refs, into)
        filled = nbytes = 0
        try:
            with closing(self._ahead(self._readers, self._get, jobs, len(jobs))) as arrived:
                for job, got in zip(jobs, arrived, strict=True):
                    if not self._take(job, got):
                        break
                    filled += 1
                    nbytes += len(job.view)
        except TierDown:
            if not filled:
                raise
        self.stats.add(hits=filled, misses=int(filled < len(refs)), bytes_read=nbytes)
        return filled

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        jobs = self._jobs(refs, data)
        kept = nbytes = 0
        try:
            with closing(self._ahead(self._writers, self._put, map(self._frame, jobs), len(jobs))) as done:
                for job, whole in zip(jobs, done, strict=True):
                    if not whole:
                        break
                    kept += 1
                    nbytes += len(job.view)
        except TierDown:
            if not kept:
                raise
        self.stats.add(bytes_written=nbytes)
        return kept

    def close(self) -> None:
        """Let go of the files and their locks.  No verb may be running; later ones raise TierDown."""
        self._readers.shutdown()
        self._writers.shutdown()
        for file in self._files:
            file.close()

    def _holds(self, ref: Ref, scratch: memoryview) -> bool:
        file, slot = self._place(ref.slot)
        if not self._get(_Job(ref, scratch, file, slot, scratch, [scratch])):
            return False
        try:
            return self._geometry.parse(scratch[:HEADER_BYTES]).key == ref.key
        except BadFrame:
            return False

    def _jobs(self, refs: Sequence[Ref], views: Sequence[memoryview]) -> list["_Job"]:
        scratch = pages(2 * max(1, len(refs)))
        return [
            self._job(ref, view, scratch[2 * i * PAGE : 2 * (i + 1) * PAGE])
            for i, (ref, view) in enumerate(zip(refs, views, strict=True))
        ]

    def _job(self, ref: Ref, view: memoryview, scratch: memoryview) -> "_Job":
        """One slot's transfer: header page, payload, and a page for the payload's ragged end."""
        if not 0 < len(view) <= self._geometry.payload_bytes:
            raise ValueError(f"buffer of {len(view)} bytes, expected at most {self._geometry.payload_bytes}")
        file, slot = self._place(ref.slot)
        whole = len(view) // PAGE * PAGE  # the part moved without a bounce
        parts = (scratch[:PAGE], view[:whole], scratch[PAGE:])
        needed = (True, whole > 0, whole < len(view))
        vector = [part for part, wanted in zip(parts, needed, strict=True) if wanted]
        return _Job(ref, view, file, slot, scratch, vector)

    def _place(self, slot: int) -> tuple[SlotFile, int]:
        """Raises ValueError for a slot that does not exist: that is a bug of the caller, not a miss."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        return self._files[slot % len(self._files)], slot // len(self._files)

    def _ahead(
        self, pool: ThreadPoolExecutor, move: Callable[["_Job"], T], jobs: Iterable["_Job"], count: int
    ) -> Generator[T, None, None]:
        """`move` of each job in order, with the next ones under way while the caller deals with one.

        Closing it waits for what is under way: the buffers are the caller's again.  Raises TierDown.
        """
        if count == 1:  # nothing to overlap with
            yield from map(move, jobs)
            return
        flying: deque[Future[T]] = deque()
        try:
            for job in jobs:
                flying.append(_submit(pool, move, job))
                if len(flying) > _AHEAD * len(self._files):
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            wait([future for future in flying if not future.cancel()])

    def _take(self, job: "_Job", got: int) -> bool:
        """Whether what was read into a job's memory is its chunk; anything damaged is dropped."""
        view, header = job.view, job.scratch[:HEADER_BYTES]
        if not got or header == NO_HEADER:
            return False
        try:
            info = self._geometry.parse(header)
            if info.key != job.ref.key:
                return False  # the slot went to another chunk since
            if got != sum(map(len, job.vector)):
                raise BadFrame(f"slot of {got} bytes")
            whole = len(view) // PAGE * PAGE
            view[whole:] = job.scratch[PAGE : PAGE + len(view) - whole]
            frame.verify(info, view)
        except frame.OtherCodec:
            return False
        except BadFrame as exc:
            log.warning("disk tier dropped slot %d: %s", job.ref.slot, exc)
            self.stats.add(bad_frames=1)
            with self._trouble(job.file):
                job.file.clear(job.slot)
            return False
        return True

    def _frame(self, job: "_Job") -> "_Job":
        """Fill in the header and the ragged end."""
        g, ref, view = self._geometry, job.ref, job.view
        tokens = self._tokens * len(view) // g.payload_bytes
        job.scratch[:HEADER_BYTES] = frame.pack(
            g.namespace, ref.key, ref.parent, ref.root, view, tokens, g.rank, g.world, g.codec
        )
        whole = len(view) // PAGE * PAGE
        job.scratch[PAGE : PAGE + len(view) - whole] = view[whole:]
        return job

    def _put(self, job: "_Job") -> bool:
        written = False
        with self._trouble(job.file):
            written = job.file.write(job.slot, job.vector)
        return written

    def _get(self, job: "_Job") -> int:
        """Bytes read from the start of a slot; 0 when its sectors cannot be read."""
        got = 0
        with self._trouble(job.file):
            got = job.file.read(job.slot, job.vector)
        return got

    @contextmanager
    def _trouble(self, file: SlotFile) -> Iterator[None]:
        """Swallow what concerns one slot, one device or a full medium; TierDown for what nothing survives."""
        try:
            yield
        except OSError as exc:
            self.stats.add(errors=1)
            if exc.errno not in _PARTIAL:
                raise TierDown(f"disk tier: {exc.strerror}") from exc
            if file.path not in self._troubled:
                self._troubled.add(file.path)
                log.warning("disk tier: %s fails (%s); its chunks are misses", file.path, exc.strerror)


class _Job(NamedTuple):
    """One slot's transfer: the caller's memory, two pages of ours, and both as the kernel takes them."""

    ref: Ref
    view: memoryview
    file: SlotFile
    slot: int  # within the file
    scratch: memoryview
    vector: list[memoryview]


def _submit(pool: ThreadPoolExecutor, move: Callable[["_Job"], T], job: "_Job") -> "Future[T]":
    """Raises TierDown when the pool is closed or has no thread to give."""
    try:
        return submit(pool, partial(move, job))
    except RuntimeError as exc:
        raise TierDown(f"disk tier: {exc}") from exc
