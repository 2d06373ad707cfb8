"""Random interleavings of requests, faults, restarts and evictions: bytes right, books balanced, always.

The rig compares every token under every load and at every answer (see rig.MiniEngine.verify) and proves the
map's books after every step; what is here only decides what happens next.
"""

import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from cacheengine.connectors.demoter import Write
from cacheengine.evict import DEFAULT_EVICTOR, EVICTORS
from cacheengine.plan import DISK, REDIS
from tests.faults.rig import (
    BLOCK,
    CHUNK,
    SCHEME,
    MiniEngine,
    Request,
    Weather,
    disk_tier,
    found,
    prompt,
    redis_tier,
)
from tests.faults.test_damage import HARMS, harm_one

pytestmark = pytest.mark.e2e  # a minute of real faults


SLOTS, HOST = 10, 5
_TRUNK = prompt(1, chunks=5)
# conversations that grow, fork at a chunk, fork inside a block, and strangers; some end on a chunk's edge
PROMPTS = (
    _TRUNK,
    _TRUNK[: 2 * CHUNK],
    _TRUNK[: 3 * CHUNK + 5],
    _TRUNK[: 2 * CHUNK] + prompt(2, chunks=2),
    _TRUNK[: CHUNK + BLOCK + 3] + prompt(3, chunks=1),
    prompt(4, chunks=4, tail=0),
    prompt(5, chunks=1, tail=1),
    prompt(6, chunks=0, tail=40),
)
prompts = st.sampled_from(PROMPTS)
SHARES = (1.0, 0.5)


class Faults(RuleBasedStateMachine):
    """An engine over a small host arena and a small disk; `shared` adds a Redis."""

    shared: Any = None  # the Valkey under the test

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        if self.shared:
            self.admin = self.shared.client()
            self.admin.flushall()
        self.asked: list[Request] = []
        self.new = 0
        self.open()

    def open(self, write: Write = "behind", share: float = 1.0, eviction: str = DEFAULT_EVICTOR) -> None:
        tiers: dict[str, Any] = {DISK: Weather(disk_tier(self.folder, SLOTS))}
        slots = {DISK: SLOTS}
        if self.shared:
            tiers[REDIS] = Weather(redis_tier(self.shared.unix_url))
            slots[REDIS] = 30
        self.weather = list(tiers.values())
        self.engine = MiniEngine(
            tiers, slots=slots, host=HOST, pages=80, restore=found(self.folder, SLOTS), patience=0.05,
            write=write, write_queue=6, share=share, eviction=eviction, io_threads=1,
        )  # fmt: skip

    @rule(tokens=prompts, device=st.integers(0, 8), salt=st.sampled_from(["", "", "a"]))
    def ask(self, tokens: tuple[int, ...], device: int, salt: str) -> None:
        blocks = min(device, (len(tokens) - 1) // BLOCK)
        self.asked = [r for r in self.asked if r.state != "done"]
        self.asked.append(self.engine.ask(tokens, blocks * BLOCK, salt))

    @rule(tokens=prompts)
    def serve(self, tokens: tuple[int, ...]) -> None:
        self.thaw()
        (request,) = self.engine.serve(tokens)
        assert request.computed == 0
        assert request.state == "done"

    @rule(n=st.integers(1, 6))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        self.engine.abort(self.asked[which % len(self.asked)])

    @rule()
    def settle(self) -> None:
        self.thaw()
        self.engine.settle()

    @rule(which=st.integers(0, 1))
    def hang(self, which: int) -> None:
        """Loads and writes stay under way while everything else goes on."""
        self.weather[which % len(self.weather)].gate.clear()

    @rule()
    def thaw(self) -> None:
        for weather in self.weather:
            weather.gate.set()

    @rule()
    def churn(self) -> None:
        """New chunks in whatever slots are free, also while loads and writes hang."""
        for _ in range(2):
            self.new += 1
            self.asked.append(self.engine.ask(prompt(100 + self.new, chunks=2)))
        for _ in range(8):
            self.engine.step()

    @rule(name=st.sampled_from(sorted(HARMS)), seed=st.integers(0, 1 << 20))
    def harm(self, name: str, seed: int) -> None:
        harm_one(self.folder, HARMS[name], random.Random(seed))
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.stat().st_size:
                os.truncate(path, 1)

    @rule(down=st.booleans(), which=st.integers(0, 1))
    def outage(self, down: bool, which: int) -> None:
        self.weather[which % len(self.weather)].down = down

    @precondition(lambda self: self.shared)
    @rule(seed=st.integers(0, 1 << 20), count=st.integers(1, 30))
    def evict_from_redis(self, seed: int, count: int) -> None:
        names = sorted(self.admin.keys("*"))
        if names:
            self.admin.delete(*random.Random(seed).sample(names, min(count, len(names))))

    @rule()
    def clear(self) -> None:
        self.engine.clear(self.folder, SLOTS)

    @rule(tokens=prompts)
    def pin(self, tokens: tuple[int, ...]) -> None:
        self.engine.store.set_pins(SCHEME.keys(tokens))

    @rule()
    def expire(self) -> None:
        self.engine.store.expire(time.monotonic())

    @rule(
        write=st.sampled_from(["behind", "idle", "on_evict"]),
        share=st.sampled_from(SHARES),
        eviction=st.sampled_from(sorted(EVICTORS)),
    )
    def restart(self, write: Write, share: float, eviction: str) -> None:
        """As after kill -9: whoever was being served is gone, the disk is what it is."""
        self.thaw()
        self.engine.close()
        self.asked = []
        self.open(write, share, eviction)

    def teardown(self) -> None:
        try:
            self.thaw()
            for weather in self.weather:
                weather.down = False
            self.engine.settle()
        finally:
            self.engine.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.shared:
                self.admin.close()


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


def test_no_interleaving_over_a_disk_yields_wrong_bytes_or_unbalanced_books():
    run_state_machine_as_test(
        Faults,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=QUIET
        ),
    )


@pytest.mark.e2e
def test_no_interleaving_over_disk_and_redis_yields_wrong_bytes_or_unbalanced_books(valkey):
    machine = type("SharedFaults", (Faults,), {"shared": valkey})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=QUIET
        ),
    )
