"""One load board for all processes of a gateway: each writes its own rows, all read everybody's.

A file, mapped by every process; 64-bit words, native order:

    magic, processes, workers, 0
    then for each process:  pid, born, version, 0,  and `workers` times:  id, id, inflight, prefilling

`id` is half of a digest of the worker's id; 0, 0 is a free place.  Only the owner writes in its block, one
aligned word at a time, so there are no locks and nothing to recover: what a dead process left is told by its
pid and its start time, and is not counted.  `version` rises when places change hands, not with the counts.

multiprocessing.shared_memory is not used: before Python 3.13 the first process that ends unlinks the memory
of all (bpo-38119).
"""

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cacheengine.keys import digest
from router.load import LoadBoard, _Row

MAX_WORKERS = 1024  # a block's places; what a process sends to further workers, only it knows
_MAGIC = 0x4341_4952_4E4C_4431
_HEAD = _PLACE = 4  # words
_LOOK_SECONDS = 1.0  # how long a dead process may still be counted
_NOBODY = (0, 0)

WorkerName = tuple[int, int]


class SharedLoadBoard(LoadBoard):
    """A LoadBoard whose counts are those of all processes.  REQUIRES: used from one event loop; no two live
    processes have the same `number`."""

    @staticmethod
    def create(path: Path, processes: int, workers: int = MAX_WORKERS) -> None:
        """An empty board for that many processes, before any of them starts; 32 bytes a place."""
        words = _HEAD + processes * _block_words(workers)
        with path.open("xb") as file:
            file.truncate(words * 8)
            file.write(struct.pack("=qqq", _MAGIC, processes, workers))

    def __init__(self, path: Path, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes block `number`, also of a process that died.  Raises OSError, or ValueError for a file that
        is no board or has no such block."""
        super().__init__()
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._memory).cast("q")
        magic, processes, self._capacity = self._words[:3]
        if magic != _MAGIC or not 0 <= number < processes:
            raise ValueError(f"{path} is no load board with a block {number}")
        size = _block_words(self._capacity)
        blocks = [_HEAD + i * size for i in range(processes)]
        self._mine = blocks.pop(number)
        self._places: dict[str, int] = {}  # worker id → first word of its place in our block
        self._free = list(range(self._mine + _HEAD, self._mine + size, _PLACE))[::-1]
        self._peers = [_Peer(self._words, block, self._capacity) for block in blocks]
        self._living: list[_Peer] = []
        self._clock, self._looked = clock, -_LOOK_SECONDS
        self._names: dict[str, WorkerName] = {}
        self._take()

    def close(self) -> None:
        """Our rows count no more.  Idempotent."""
        if self._memory.closed:
            return
        self._words[self._mine] = 0
        for peer in self._peers:
            peer.close()
        self._words.release()
        self._memory.close()

    def open(self, worker_id: str) -> tuple[int, int]:
        """Requests of all processes that are open on the worker, and prompt tokens of theirs it has still to
        compute."""
        inflight, prefilling = super().open(worker_id)
        now = self._clock()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._living = [peer for peer in self._peers if peer.look()]
        name = self._name(worker_id)
        for peer in self._living:
            more = peer.read(name)
            inflight, prefilling = inflight + more[0], prefilling + more[1]
        return inflight, prefilling

    def _take(self) -> None:
        """Nobody believes a block without a pid: it goes first and comes last."""
        words, mine = self._words, self._mine
        words[mine] = 0
        words[mine + _HEAD : mine + _block_words(self._capacity)] = memoryview(
            bytes(8 * _PLACE * self._capacity)
        ).cast("q")
        words[mine + 1] = born(os.getpid())
        words[mine + 2] += 1
        words[mine] = os.getpid()

    def _changed(self, worker_id: str, row: _Row) -> None:
        place = self._places.get(worker_id)
        if place is None:
            if not row.inflight or not self._free:
                return
            place = self._places[worker_id] = self._free.pop()
            self._words[place], self._words[place + 1] = self._name(worker_id)
            self._words[self._mine + 2] += 1
        self._words[place + 2], self._words[place + 3] = row.inflight, row.prefilling

    def forget(self, worker_id: str) -> None:
        super().forget(worker_id)
        if worker_id in self._rows:  # something is still open on it
            return
        self._names.pop(worker_id, None)
        if (place := self._places.pop(worker_id, None)) is not None:
            self._words[place], self._words[place + 1] = _NOBODY
            self._words[self._mine + 2] += 1
            self._free.append(place)

    def _name(self, worker_id: str) -> WorkerName:
        if (name := self._names.get(worker_id)) is None:
            first, second = struct.unpack("=qq", digest(worker_id.encode()))
            name = self._names[worker_id] = (first, second)
        return name


class _Peer:
    """Another process's block, read only."""

    def __init__(self, words: memoryview, block: int, capacity: int) -> None:
        self._words, self._block, self._capacity = words, block, capacity
        self._version = -1
        self._alive = False
        self._places: dict[WorkerName, int] = {}

    def close(self) -> None:
        self._alive = False

    def look(self) -> bool:
        """Is it alive, and where are its places?  The latter also without a new version: on a machine that
        reorders stores a directory may have been read half written."""
        pid, started = self._words[self._block], self._words[self._block + 1]
        self._alive = pid != 0 and born(pid) == started
        if self._alive:
            self._read_places()
        return self._alive

    def read(self, name: WorkerName) -> tuple[int, int]:
        if not self._alive or not self._words[self._block]:
            return 0, 0
        if self._words[self._block + 2] != self._version:
            self._read_places()
        if (place := self._places.get(name)) is None:
            return 0, 0
        return max(0, self._words[place + 2]), max(0, self._words[place + 3])

    def _read_places(self) -> None:
        self._version = self._words[self._block + 2]
        self._places = dict(self._held())

    def _held(self) -> Iterator[tuple[WorkerName, int]]:
        first = self._block + _HEAD
        words = self._words[first : first + _PLACE * self._capacity].tolist()
        for at in range(0, len(words), _PLACE):
            if (name := (words[at], words[at + 1])) != _NOBODY:
                yield name, first + at


def born(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5)), so that a pid used again is somebody else;
    0 when it has ended.  Without /proc 1 for every living process of ours."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return 0
    try:
        os.kill(pid, 0)
    except OSError:
        return 0
    return 1


def _block_words(workers: int) -> int:
    return _HEAD + _PLACE * workers
