"""The half of the connector that lives beside vLLM's scheduler: owns the map, plans, publishes."""

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cacheengine.config import CacheConfig
from cacheengine.connectors.demoter import Demoter
from cacheengine.connectors.device import DeviceMap
from cacheengine.connectors.geometry import served_name
from cacheengine.connectors.planner import Geometry, Planner, Scheduled
from cacheengine.connectors.remote import Remote, nobody
from cacheengine.connectors.tiers import (
    disk_folders,
    disk_slots,
    host_slots,
    redis_tier,
    stored_bytes,
    worker_id,
    write_mode,
)
from cacheengine.connectors.wire import EngineStats, RankWords, StepPlans
from cacheengine.errors import CacheError
from cacheengine.evict import EVICTORS
from cacheengine.index_schema import Entry, WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, probe_keys
from cacheengine.layout import KVLayout
from cacheengine.metrics import INDEX_COUNTS, Tally
from cacheengine.plan import DISK, HOST, NO_PARENT, REDIS, Want
from cacheengine.store import Store
from cacheengine.tiers.disk import erase, scan
from cacheengine.wishes import Listener, Wish

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

REDIS_REMEMBERED = 200_000  # chunks we remember having put there; Redis itself is asked before every load
BUSY_SECONDS = 30.0
WRITE_QUEUE = 256  # chunks under way to one tier: a bound on what a tier that hangs holds in host memory
INDEX_TTL_SECONDS = 1800.0  # of an entry, renewed three times in it: less costs Redis, more keeps the dead
# A silent worker is forgotten after this long.  It beats three times as often, so two beats may be lost.
LEASE_SECONDS = 6.0
PATIENCE_FACTOR = 2.0  # a Redis look-up may take this many deadlines before it counts as a miss


class SchedulerHalf:
    """One writer: everything but the two callbacks of the index thread runs on vLLM's scheduler thread."""

    def __init__(self, vllm_config: "VllmConfig", layout: KVLayout, config: CacheConfig) -> None:
        self._config, self._layout = config, layout
        self._served = served_name(vllm_config)
        self._ranks = vllm_config.parallel_config.world_size
        self._seats = vllm_config.scheduler_config.max_num_seqs
        self._computed = 0  # tokens given to the engine to compute, cacheable or not
        self._tally = Tally()
        self._counted: dict[tuple[str, str], int] = {}
        self._stirred = 0.0  # when a plan was last made or reported
        slots = {HOST: host_slots(config, layout)}
        if config.disk_path:
            slots[DISK] = disk_slots(config, layout)
        if config.redis_url:
            slots[REDIS] = REDIS_REMEMBERED
        self._lock = threading.Lock()  # whoever asks the store or changes it holds this
        self.store = Store(slots, layout.blocks_per_chunk, EVICTORS[config.eviction], config.tenant_share)
        if config.disk_path:
            self._restore_disk()
        note = disk_folders(config)[0] / "wishes.json" if config.disk_path else None
        self._wishes = Listener(layout.scheme.namespace.hex(), self._served, self.obey, note)
        self._remote: Remote | None = None
        if config.redis_url:
            tiers = [redis_tier(config, layout, self._served, r, self._ranks) for r in range(self._ranks)]
            self._remote = Remote(tiers)
        patience = PATIENCE_FACTOR * config.redis_timeout_ms / 1000
        probe = self._remote.ask if self._remote else nobody
        geometry = Geometry(layout.chunk_tokens, layout.payload_bytes, layout.block_tokens, self._ranks)
        demoter = Demoter(self.store, write_mode(config), WRITE_QUEUE)
        self.planner = Planner(
            layout.scheme, geometry, self.store, demoter, probe, patience, self._tally, loading=config.loading
        )
        self._live: dict[str, Request] = {}
        self._refused: set[str] = set()
        self._generation = ""  # a tag on every name once the cache was reset
        self._device: DeviceMap | None = None
        self._index: IndexWriter | None = None
        self._wishes.start(config.redis_url)
        self._index = self._start_index(vllm_config)

    def watch(self, pool: "BlockPool") -> None:
        """Publish what vLLM's own prefix cache holds, where it has one and there is an index."""
        if self._index is not None and pool.enable_caching:
            self._device = DeviceMap(pool, self._layout.chunk_tokens, self._layout.blocks_per_chunk)

    # -- a request's life --------------------------------------------------------------------------

    def begin(self, request: "Request") -> None:
        reason = _uncacheable(request)
        if reason:
            if reason not in self._refused:
                logger.info("not cached: %s", reason)
                self._refused.add(reason)
            return
        self._live[request.request_id] = request
        with self._lock:
            self.planner.begin(request.request_id, request.all_token_ids, _tags(request, self._generation))

    def matched(self, request: "Request", computed: int) -> int | None:
        with self._lock:
            return self.planner.matched(request.request_id, request.all_token_ids, computed)

    def allocated(self, request: "Request", blocks: Sequence[int], external: int) -> None:
        with self._lock:
            self.planner.allocated(request.request_id, blocks, external)

    def plans(self, output: "SchedulerOutput") -> StepPlans:
        """What the step about to run should load and save."""
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        state = output.kv_connector_block_state
        scheduled = []
        for req_id, new in output.num_scheduled_tokens.items():
            request = self._live.get(req_id)
            blocks = state.get_block_ids(req_id) if state is not None and request is not None else None
            if request is not None and blocks is not None:
                scheduled.append(Scheduled(req_id, request.all_token_ids, computed[req_id], new, blocks[0]))
        self._computed += sum(output.num_scheduled_tokens.values())
        with self._lock:
            plans = self.planner.step(scheduled)
            if self._config.ttl_seconds:
                self.store.expire(time.monotonic() - self._config.ttl_seconds)
            if self._device is not None:
                for req_id in cached.resumed_req_ids:  # preempted meanwhile: it has other blocks
                    self._device.end(req_id)
                self._device.step(scheduled, self.planner.keys)
            self._publish()
        self._stirred = time.monotonic() if plans else self._stirred
        return StepPlans(plans, sum(item.new for item in scheduled if item.new > 1))

    def heard(self, words: RankWords) -> None:
        for timing in words.timings:
            tier = HOST if timing.op == "scatter" else timing.tier
            if timing.op in ("read", "scatter"):
                self.planner.rates.observe_read(tier, timing.bytes, timing.seconds)
        for tokens, seconds in words.prefill:
            self.planner.rates.observe_prefill(tokens, seconds)
        with self._lock:
            self.planner.report(words.words)
            self._publish()
        self._stirred = time.monotonic() if words.words else self._stirred

    def end(self, req_id: str) -> None:
        self._live.pop(req_id, None)
        with self._lock:
            self.planner.end(req_id)
        if self._device is not None:
            self._device.end(req_id)

    def clear(self) -> bool:
        """Nothing stored before can be found again by this process: the weights may have changed.

        Always True, since it needs no bytes to go: chunks get other names from now on, which neither a plan
        under way nor the disk nor Redis has heard of.  A later process that loads the weights on disk finds
        what they made, and nothing else.  Requests that run now are no longer cached: a chunk that began
        with the old weights must not end up under any name.
        """
        self._generation = uuid.uuid4().hex
        for req_id in list(self._live):
            self.end(req_id)
        with self._lock:
            self.store.clear(erase=False)  # the headers may stay: nobody here can ask for those names
            if self._device is not None:
                self._device.clear()
            self._publish()
        return True

    def obey(self, wish: Wish, before: Wish) -> None:
        """Make true what people want now and did not want before.  On the index writer's thread, and once at
        start.  Raises TierDown when slots could not be erased: it is then tried again."""
        slots: list[int] = []
        with self._lock:
            if wish.pins_version != before.pins_version:
                self.store.set_pins(wish.pins)
            if wish.clear_epoch != before.clear_epoch:
                slots = self.store.clear()
            self._publish()
        self._erase(slots)

    def _erase(self, slots: Sequence[int]) -> None:
        """Make cleared disk slots empty for good.  Outside the lock, so that no step waits for the disk: the
        store gives such a slot to nobody before erased().  Raises TierDown."""
        if not slots:
            return
        config, layout = self._config, self._layout
        stored = stored_bytes(config.disk_codec, layout)
        where = disk_folders(config), int(config.disk_bytes), stored, layout.scheme.namespace
        for rank in range(self._ranks):
            erase(*where, rank, self._ranks, slots)
        with self._lock:
            self.store.erased(slots)

    @property
    def busy(self) -> bool:
        """Reports are still out: keep the engine stepping so that they are heard.  Not for ever: a medium
        that hangs in the kernel would keep an idle engine spinning."""
        if self._device is not None and self._device.stirred:
            return True  # one step publishes it
        return self.planner.busy and time.monotonic() - self._stirred < BUSY_SECONDS

    def stats(self) -> EngineStats | None:
        for (what, tier), total in self.store.lost().items():
            since = total - self._counted.get((what, tier), 0)
            self._tally.add(f"cairn_engine_{what}_chunks_total", since, tier)
            self._counted[what, tier] = total
        if self._index is not None:
            for what in INDEX_COUNTS:
                total = getattr(self._index.stats, what)
                since = total - self._counted.get(("index", what), 0)
                self._tally.add(f"cairn_engine_index_{what}_total", since)
                self._counted["index", what] = total
        values = self._tally.take()
        if not values:
            return None
        for tier, rate in self.planner.rates.read.items():
            values["cairn_engine_read_bytes_per_second", (tier,)] = rate
        values["cairn_engine_prefill_tokens_per_second", ()] = self.planner.rates.prefill
        for tier in self.store.lower:
            values["cairn_engine_backlog_chunks", (tier,)] = self.store.backlog(tier)
        for tier, (used, capacity) in self.store.fill().items():
            values["cairn_engine_used_chunks", (tier,)] = used
            values["cairn_engine_capacity_chunks", (tier,)] = capacity
        return EngineStats.of(values)

    def close(self) -> None:
        if self._index is not None:
            self._index.close()
        if self._remote is not None:
            self._remote.close()

    # -- the index ---------------------------------------------------------------------------------

    def _start_index(self, vllm_config: "VllmConfig") -> IndexWriter | None:
        config, layout = self._config, self._layout
        if not config.redis_url or not config.worker_url:
            logger.info("not in the chunk index: redis_url and worker_url are not both set")
            return None
        info = WorkerInfo(
            worker_id=worker_id(config),
            url=config.worker_url,
            model=self._served,
            model_path=vllm_config.model_config.model,
            namespace=layout.scheme.namespace.hex(),
            chunk_tokens=layout.chunk_tokens,
            probe_keys=tuple(probe_keys(layout.scheme)),
            block_size=layout.block_tokens,
            world_size=self._ranks,
            payload_bytes=layout.payload_bytes * self._ranks,
            tiers=tuple(self.store.fill()),
            boot_id=uuid.uuid4().hex,
        )
        index = IndexWriter(
            config.redis_url,
            info,
            INDEX_TTL_SECONDS,
            LEASE_SECONDS,
            self._beat,
            self._inventory,
            wishes=self._wishes,
        )
        index.start()
        return index

    def _publish(self) -> None:
        changes = self.store.drain_changes()
        if self._index is None:
            return
        if self._device is not None:
            changes = self._device.merge(changes, self.store.bits)
        if changes:
            self._index.publish(changes)

    def _inventory(self) -> list[Entry]:
        held = self.store.inventory()
        return held if self._device is None else self._device.inventory(held)

    def _beat(self) -> Mapping[str, float | int | str]:
        with self._lock:
            late = self.store.to_erase()  # what was under way when the rest was cleared
        try:
            self._erase(late)
        except CacheError as exc:
            logger.warning("cleared chunks are still on disk: %s", exc)
        fill = {
            f"{tier}_{what}": n
            for tier, pair in self.store.fill().items()
            for what, n in zip(("used", "slots"), pair, strict=True)
        }
        if self._device is not None:
            fill |= {"device_used": len(self._device), "device_slots": self._device.slots}
        up = int(self._remote.mend()) if self._remote else 0
        totals = {**self.planner.totals(), "computed_tokens": self._computed, "max_num_seqs": self._seats}
        return {**self.planner.load(), **fill, **totals, "redis_up": up, "layout": self._layout.name}

    # -- start -------------------------------------------------------------------------------------

    def _restore_disk(self) -> None:
        """A restart is warm: take in every chunk that all ranks hold in the same slot."""
        config, layout = self._config, self._layout
        found: dict[int, Want] = {}
        used: set[int] = set()
        for rank in range(self._ranks):
            headers = scan(
                disk_folders(config),
                config.disk_bytes,
                stored_bytes(config.disk_codec, layout),
                layout.scheme.namespace,
                rank,
                self._ranks,
                config.disk_codec,
            )
            here = {
                slot: Want(
                    info.key,
                    ChunkKey(info.parent) if info.parent else NO_PARENT,
                    ChunkKey(info.root),
                    info.tokens // layout.block_tokens,
                )
                for slot, info in headers.items()
            }
            used |= here.keys()
            found = here if rank == 0 else {s: v for s, v in found.items() if here.get(s) == v}
        taken = self.store.restore(DISK, found, used)
        logger.info("disk tier: %d chunks found, %d usable", len(found), taken)


def _uncacheable(request: "Request") -> str | None:
    if request.mm_features:
        return "multimodal prompts (token ids alone do not name their KV)"
    if request.prompt_embeds is not None:
        return "prompts given as embeddings"
    if request.lora_request is not None:
        return "requests for LoRA adapters (their names do not prove their weights)"
    if request.resumable:
        return "streaming-input sessions (their prompt may still change)"
    return None


def _tags(request: "Request", generation: str) -> list[tuple[str, str]]:
    """`generation` stands where an adapter would: weights of another name."""
    tags = [("salt", request.cache_salt or ""), ("lora", generation)]
    return [(kind, value) for kind, value in tags if value]
