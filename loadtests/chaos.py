"""Faults for a running stack, one at a time at random: what loadtests/soak.py breaks."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import httpx
import redis

from gateway.launch.processes import kill_group

T = TypeVar("T")
Fault = Callable[[], float | None]
_PAUSE_SECONDS = (4.0, 12.0)  # between the end of one fault and the next
_LONGEST_FREEZE_SECONDS = 10.0
_VALKEY_KILLS = 4  # the supervisor gives a part up that fails six times in a row
_WORKER_KILLS = 3
_FLOOD = 4  # prompts nobody asks again
_SQUEEZED_BYTES = 40 << 20


class Chaos:
    """`parts` tells the pids of what runs now; `whole` says whether every worker serves.

    tick() is called once a second or so; it starts a fault when it is time for one, and ends it.
    """

    def __init__(
        self,
        parts: Callable[[], dict[str, int]],
        redis_url: str,
        disk: Path,
        url: str,
        seed: int,
        whole: Callable[[], bool],
    ) -> None:
        self._parts, self._redis_url, self._disk, self._url, self._whole = parts, redis_url, disk, url, whole
        self._rng = random.Random(f"chaos {seed}")
        self.counts: Counter[str] = Counter()
        self.kills: list[float] = []  # when workers were killed, time.monotonic()
        self.last = "none yet"
        self._next = time.monotonic() + 5.0
        self._undo: Callable[[], object] | None = None
        self._deck: list[Fault] = [self.freeze, self.kill_worker]  # a worker first: it takes long to be back

    def tick(self, *, kills: bool) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        if self._undo:
            self.heal()
            self._next = now + self._rng.uniform(*_PAUSE_SECONDS)
            return
        fault = self._draw(kills)
        self.last = fault.__name__
        lasts = fault()
        if lasts is not None:
            self.counts[self.last] += 1
            self._next = now + lasts + (0.0 if self._undo else self._rng.uniform(*_PAUSE_SECONDS))

    def heal(self) -> None:
        """End what is under way."""
        undo, self._undo = self._undo, None
        if undo:
            undo()

    def _draw(self, kills: bool) -> Fault:
        """The next card: every fault comes once before any comes again."""
        if not self._deck:
            self._deck = [
                self.freeze, self.flip, self.truncate, self.squeeze, self.flush, self.flood, self.kill_valkey,
                self.kill_worker,
            ]  # fmt: skip
            self._rng.shuffle(self._deck)
        fault = self._deck.pop()
        if fault == self.kill_valkey and self.counts["kill_valkey"] >= _VALKEY_KILLS:
            return self.freeze
        tired = self.counts["kill_worker"] >= _WORKER_KILLS
        if fault == self.kill_worker and (tired or not kills or not self._whole()):
            return self.flip
        return fault

    # -- faults: each returns how many seconds it lasts, None when there was nothing to break ------

    def freeze(self) -> float | None:
        """SIGSTOP: connections stay open and nothing answers."""
        if not (pid := self._parts().get("valkey")):
            return None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        self._undo = lambda: _thaw(pid)
        return self._rng.uniform(1.0, _LONGEST_FREEZE_SECONDS)

    def kill_valkey(self) -> float | None:
        """kill -9; the supervisor starts it again, empty."""
        if not (pid := self._parts().get("valkey")):
            return None
        kill_group(pid)
        return 10.0

    def kill_worker(self) -> float | None:
        """kill -9 of all its processes; the supervisor starts it again, over the same disk."""
        workers = [pid for name, pid in sorted(self._parts().items()) if name.startswith("w")]
        if len(workers) < 2:
            return None
        self.kills.append(time.monotonic())
        kill_group(self._rng.choice(workers))
        return 1.0

    def flip(self) -> float | None:
        """Bits in a file of a disk tier."""
        if not (path := self._disk_file()):
            return None
        with path.open("r+b") as f:
            for _ in range(60):
                f.seek(self._rng.randrange(path.stat().st_size))
                byte = f.read(1)
                f.seek(-1, os.SEEK_CUR)
                f.write(bytes([byte[0] ^ 1 << self._rng.randrange(8)]))
        return 0.0

    def truncate(self) -> float | None:
        """A file of a disk tier loses its end, and gets it back as zeros."""
        if not (path := self._disk_file()):
            return None
        size = path.stat().st_size
        os.truncate(path, self._rng.randrange(size))
        self._undo = lambda: os.truncate(path, max(size, path.stat().st_size))
        return self._rng.uniform(0.0, 4.0)

    def squeeze(self) -> float | None:
        """Valkey evicts nearly everything it has."""
        before = self._ask(lambda client: str(client.config_get("maxmemory")["maxmemory"]))
        if before is None or self._ask(lambda c: c.config_set("maxmemory", _SQUEEZED_BYTES)) is None:
            return None
        self._undo = lambda: self._ask(lambda client: client.config_set("maxmemory", before))
        return self._rng.uniform(1.0, 6.0)

    def flush(self) -> float | None:
        """Everything in Valkey is gone, the chunk index too."""
        return None if self._ask(lambda client: client.flushall()) is None else 0.0

    def flood(self) -> float | None:
        """Prompts that nobody will ask again push out what is useful."""
        lengths = [self._rng.randrange(300, 1200) for _ in range(_FLOOD)]
        prompts = [[self._rng.randrange(100, 40_000) for _ in range(length)] for length in lengths]
        threading.Thread(target=self._pour, args=(prompts,), daemon=True).start()
        return 10.0

    # -- inside ------------------------------------------------------------------------------------

    def _pour(self, prompts: Sequence[Sequence[int]]) -> None:
        for prompt in prompts:
            body = {"model": "soak", "prompt": list(prompt), "max_tokens": 1}
            with suppress(httpx.HTTPError):
                httpx.post(f"{self._url}/v1/completions", json=body, timeout=60, trust_env=False)

    def _disk_file(self) -> Path | None:
        files = [path for path in sorted(self._disk.rglob("*")) if path.is_file() and path.stat().st_size]
        return self._rng.choice(files) if files else None

    def _ask(self, question: "Callable[[redis.Redis], T]") -> T | None:
        try:
            with redis.Redis.from_url(self._redis_url, socket_timeout=2, decode_responses=True) as client:
                return question(client)
        except redis.RedisError:
            return None


def _thaw(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
