"""The half of the connector that lives in each rank: executes plans on the KV cache itself."""

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cacheengine.arena import Arena
from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.geometry import compute_cores
from cacheengine.connectors.tiers import IO_THREADS, host_slots, lower_tiers
from cacheengine.connectors.wire import EngineStats, RankWords
from cacheengine.errors import LayoutMismatch
from cacheengine.layout import KVLayout
from cacheengine.metrics import Tally
from cacheengine.mover import Mover
from cacheengine.ops import Paged, load
from cacheengine.plan import Plan, Timing

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class RankHalf:
    """Called by the model runner's thread only."""

    def __init__(self, layout: KVLayout, config: CacheConfig, model: str, rank: int, world: int) -> None:
        self._layout, self._config, self._rank = layout, config, rank
        self._mover: Mover | None = None
        lower = list(lower_tiers(config, layout, model, rank, world))
        self._tiers = {tier.name: tier for tier, _ in lower}
        self._stats = {tier.name: stats for tier, stats in lower}
        self._tally = Tally()
        self._bad: set[int] = set()
        self._words: dict[int, tuple[int, int]] = {}
        self._timings: list[Timing] = []
        self._prefill: list[tuple[int, float]] = []
        self._step_began = 0.0
        self._counted: dict[str, int] = {}
        self._open: dict[str, bool] = {}

    def register(self, kv_caches: Mapping[str, "torch.Tensor"]) -> None:
        """Look at the live tensors once.  Raises LayoutMismatch when they are not what the map was told."""
        load()
        paged = Paged.of(list(kv_caches.values()))
        layout = self._layout
        if (len(paged.bases), paged.block_bytes) != (layout.layers, layout.block_bytes):
            raise LayoutMismatch(
                f"vLLM registered {len(paged.bases)} layers of {paged.block_bytes}-byte blocks, "
                f"its configuration promised {layout.layers} of {layout.block_bytes}"
            )
        arena = _arena(host_slots(self._config, layout), layout.payload_bytes)
        self._mover = Mover(
            paged,
            arena,
            self._tiers,
            io_threads=IO_THREADS,
            cores=spare_cores(compute_cores()),
            verify_loads=self._config.verify_loads,
        )
        logger.info(
            "rank %d: %d layers × %d blocks of %d bytes (%s); host arena %d chunks of %d bytes; below it: %s",
            self._rank, len(paged.bases), paged.num_blocks, paged.block_bytes, layout.name,
            arena.slots, arena.slot_bytes, ", ".join(self._tiers) or "nothing",
        )  # fmt: skip

    def begin_step(self) -> None:
        """The forward pass is about to start."""
        self._step_began = time.perf_counter()

    def end_step(self, prefill_tokens: int) -> None:
        """The forward pass is over (on CUDA: launched, so the rate is only meant for the CPU so far)."""
        if prefill_tokens:
            self._prefill.append((prefill_tokens, time.perf_counter() - self._step_began))

    def load(self, plans: list[Plan]) -> None:
        if self._mover is not None:
            for plan in plans:
                if plan.kind == "load":
                    self._mover.load(plan)
                elif plan.kind == "demote":
                    self._mover.demote(plan)

    def save(self, plans: list[Plan]) -> None:
        if self._mover is not None:
            self._mover.save([plan for plan in plans if plan.kind == "save"])

    def poll(self) -> set[str]:
        """Collect what the mover did; the requests whose loads are over."""
        if self._mover is None:
            return set()
        outcome = self._mover.poll()
        self._bad |= outcome.bad_blocks
        self._timings += outcome.timings
        for report in outcome.reports:
            self._words[report.plan] = (1, report.kept)
        for timing in outcome.timings:
            self._tally.add("cairn_engine_moved_bytes_total", timing.bytes, timing.tier, timing.op)
            self._tally.add("cairn_engine_moved_seconds_total", timing.seconds, timing.tier, timing.op)
        self._tally.add("cairn_engine_verify_failures_total", outcome.verify_failures)
        return outcome.loaded

    def take_bad_blocks(self) -> set[int]:
        bad, self._bad = self._bad, set()
        return bad

    def take_words(self) -> RankWords | None:
        if not self._words and not self._prefill:
            return None
        words = RankWords(self._words, self._timings, self._prefill)
        self._words, self._timings, self._prefill = {}, [], []
        return words

    def stats(self) -> EngineStats | None:
        for name, tier in self._tiers.items():
            bad = self._stats[name].bad_frames
            self._tally.add("cairn_engine_bad_frames_total", bad - self._counted.get(name, 0), name)
            self._counted[name] = bad
            if tier.open != self._open.get(name):
                self._open[name] = tier.open
                self._tally.set("cairn_engine_breaker_open", float(tier.open), name)
        values = self._tally.take()
        return EngineStats.of(values) if values else None

    def close(self) -> None:
        if self._mover is not None:
            self._mover.close()


def _arena(slots: int, slot_bytes: int) -> Arena:
    """An arena whose memory is already taken.  Raises ConfigError when it does not fit."""
    arena, start = Arena(slots, slot_bytes), time.perf_counter()
    try:
        all(arena.populate(slot) for slot in range(slots))
    except OSError:
        raise ConfigError(f"host_bytes={arena.nbytes} does not fit in memory; lower it") from None
    logger.info("took %d MiB for the host tier in %.1f s", arena.nbytes >> 20, time.perf_counter() - start)
    return arena


def spare_cores(computing: frozenset[int]) -> frozenset[int]:
    """Cores of this machine nobody computes on: neither the calling (model) thread, which is bound, nor the
    other ranks, where `computing` names their cores.  All of them when none is left: then the kernel knows
    best which is idle."""
    every = frozenset(range(os.cpu_count() or 1))
    return every - frozenset(os.sched_getaffinity(0)) - computing or every
