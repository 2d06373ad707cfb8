"""vLLM's KVConnectorBase_V1, spelled out: every call goes to one of our two halves.

Loads are asynchronous, so a slow tier never stalls a step.  Best effort: a model this engine cannot cache
safely, or a request it cannot name, is served as if we were not here.  Pinned to vLLM 0.32; the contract is
in vllm/distributed/kv_transfer/kv_connector/v1/base.py.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.geometry import layout_of, served_name, why_not
from cacheengine.connectors.rank import RankHalf
from cacheengine.connectors.scheduler import SchedulerHalf
from cacheengine.connectors.wire import EngineProm, EngineStats, RankWords, StepPlans
from cacheengine.plan import DISK, HOST

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_SOURCES = {HOST: CacheHitSource.HOST, DISK: CacheHitSource.DISK}


class CairnConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance per process: the scheduler's owns a SchedulerHalf, a rank's owns a RankHalf."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        transfer = vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(
                'a cache must never fail a request: add "kv_load_failure_policy":"recompute" '
                'to --kv-transfer-config (vLLM\'s default is "fail")'
            )
        self._scheduler: SchedulerHalf | None = None
        self._rank: RankHalf | None = None
        config = CacheConfig.load(**transfer.kv_connector_extra_config)
        if reason := why_not(vllm_config, kv_cache_config, config):
            logger.warning("the Cairn cache is off for this worker: %s", reason)
            return
        layout = layout_of(vllm_config, kv_cache_config, config)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(vllm_config, layout, config)
        else:
            parallel = vllm_config.parallel_config
            self._rank = RankHalf(
                layout, config, served_name(vllm_config), parallel.rank, parallel.world_size
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a cache, not a prefill/decode hand-off."""
        return False

    # -- scheduler ---------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        if self._scheduler:
            self._scheduler.watch(gpu_block_pool)

    def on_new_request(self, request: "Request") -> None:
        if self._scheduler:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not self._scheduler:
            return 0, False
        matched = self._scheduler.matched(request, num_computed_tokens)
        return matched, bool(matched)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        if self._scheduler and num_external_tokens > 0:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: "Request", num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        if not self._scheduler or not num_external_tokens:
            return {}
        sources: dict[CacheHitSource, int] = {}
        for tier, tokens in self._scheduler.planner.sources(request.request_id).items():
            source = _SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            sources[source] = sources.get(source, 0) + tokens
        return sources

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self._scheduler.plans(scheduler_output) if self._scheduler else StepPlans()

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        words = connector_output.kv_connector_worker_meta
        if self._scheduler and isinstance(words, RankWords):
            self._scheduler.heard(words)

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """False: chunks were gathered in the step that computed them, so the blocks are free to go."""
        if self._scheduler:
            self._scheduler.end(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping until write-behind has reported, or its slots would stay leased."""
        return self._scheduler is not None and self._scheduler.busy

    def reset_cache(self) -> bool | None:
        return self._scheduler.clear() if self._scheduler else True

    # -- ranks -------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._rank:
            self._rank.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._rank:
            self._rank.begin_step()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        if self._rank:
            self._rank.load(self._step().plans)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return None

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        return None

    def wait_for_save(self) -> None:
        if self._rank:
            self._rank.end_step(self._step().prefill_tokens)
            self._rank.save(self._step().plans)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, (self._rank.poll() or None) if self._rank else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._rank.take_bad_blocks() if self._rank else set()

    def build_connector_worker_meta(self) -> RankWords | None:
        return self._rank.take_words() if self._rank else None

    # -- both --------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        half = self._scheduler or self._rank
        return half.stats() if half else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> "KVConnectorStats | None":
        return EngineStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: "VllmConfig", metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> "KVConnectorPromMetrics":
        return EngineProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        half = self._scheduler or self._rank
        if half:
            half.close()

    def _step(self) -> StepPlans:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepPlans)
        return metadata


def _log_like_vllm() -> None:
    """Our lines go where vLLM's go, in its format."""
    ours, theirs = logging.getLogger("cacheengine"), logging.getLogger("vllm")
    ours.handlers, ours.propagate = list(theirs.handlers), False
    ours.setLevel(theirs.getEffectiveLevel())
