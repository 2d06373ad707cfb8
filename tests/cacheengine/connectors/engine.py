"""An engine without a model: vLLM's real scheduler, both real halves of the connector, real paged tensors.

The "model" is a recurrence that lives in the KV cache: each token's state is computed from the state that is
*read from the page* of the token before it, and the next token from the last state.  One wrong page, and
every token after it is another.
"""

import json
import time
from pathlib import Path

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cacheengine.connectors.vllm import CairnConnector

BLOCK, CHUNK, LAYERS = 16, 64, 2
_PRIME = 16_777_213  # states are exact in float32
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "head_dim": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "intermediate_size": 64,
    "vocab_size": 50_000, "max_position_embeddings": 4096, "torch_dtype": "float32",
}  # fmt: skip


def after(state: int, token: int) -> int:
    return (state * 31 + token * 7 + 1) % _PRIME


def truth(prompt: list[int], n: int) -> list[int]:
    """The right answer, from no cache at all."""
    state, answer = 0, []
    for token in prompt:
        state = after(state, token)
    for _ in range(n):
        answer.append(state % 40_000)
        state = after(state, answer[-1])
    return answer


class Engine:
    """`budget` tokens a step, `blocks` in the device cache; other arguments are the cache's knobs."""

    def __init__(
        self, folder: Path, *, blocks: int = 400, budget: int = 160, caching: bool = True,
        policy: str = "fcfs", ranks: int = 1, **cache: object,
    ) -> None:  # fmt: skip
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors").write_bytes(bytes(64))
        config = self._config(folder, blocks, budget, caching, policy, ranks, cache)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
        names = [f"layer.{i}" for i in range(LAYERS)]
        pages = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.kv = [torch.zeros(LAYERS, blocks, 1, BLOCK, 128) for _ in range(ranks)]
        self.scheduler = Scheduler(
            config, pages, StructuredOutputManager(config), block_size=BLOCK, log_stats=True
        )
        self.ranks = []
        for rank, kv in enumerate(self.kv):
            config.parallel_config.rank = rank  # as each worker process has it
            self.ranks.append(CairnConnector(config, KVConnectorRole.WORKER, pages))
            self.ranks[-1].register_kv_caches(dict(zip(names, kv, strict=True)))
        self._aggregator = KVOutputAggregator(ranks)
        self.half = self.scheduler.connector._scheduler
        self.answers: dict[str, list[int]] = {}
        self.resumed = 0  # requests that came back after a preemption, once a rank

    @staticmethod
    def _config(folder, blocks, budget, caching, policy, ranks, cache) -> VllmConfig:
        transfer = KVTransferConfig(
            kv_connector="CairnConnector", kv_connector_module_path="cacheengine.connectors.vllm",
            kv_role="kv_both", kv_load_failure_policy="recompute",
            kv_connector_extra_config={"chunk_tokens": CHUNK, "host_bytes": 4 << 20, **cache},
        )  # fmt: skip
        paging = CacheConfig(block_size=BLOCK, enable_prefix_caching=caching)
        paging.num_gpu_blocks = blocks
        return VllmConfig(
            model_config=ModelConfig(
                model=str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=2048
            ),
            cache_config=paging,
            scheduler_config=SchedulerConfig(
                max_num_seqs=16, max_num_batched_tokens=budget, max_model_len=2048, policy=policy,
                enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=False,
            ),
            parallel_config=ParallelConfig(tensor_parallel_size=ranks),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=transfer,
        )  # fmt: skip

    # -- clients -----------------------------------------------------------------------------------

    def add(self, req_id: str, prompt: list[int], n: int = 8, priority: int = 0, **fields: object) -> None:
        sampling = SamplingParams(max_tokens=n, ignore_eos=True, **fields.pop("sampling", {}))
        request = Request(
            req_id, list(prompt), sampling, None, priority=priority, block_hasher=self._hasher, **fields
        )
        self.answers[req_id] = []
        self.scheduler.add_request(request)

    def abort(self, req_id: str) -> None:
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)

    def ask(self, prompt: list[int], n: int = 8, **fields: object) -> list[int]:
        req_id = f"ask {len(self.answers)}"
        self.add(req_id, prompt, n, **fields)
        self.run()
        return self.answers[req_id]

    def run(self, seconds: float = 60) -> None:
        """Until nothing is left to do, reports included."""
        until = time.monotonic() + seconds
        while self.scheduler.has_requests():
            assert time.monotonic() < until, "the engine does not come to rest"
            self.step()

    # -- one step, as the engine core and the model runner take it ---------------------------------

    def step(self) -> None:
        output = self.scheduler.schedule()
        replies = [self._execute(rank, kv, output) for rank, kv in zip(self.ranks, self.kv, strict=True)]
        reply = self._aggregator.aggregate(replies, 0)
        for outputs in self.scheduler.update_from_output(output, reply).values():
            for item in outputs.outputs:
                self.answers[item.request_id] += item.new_token_ids

    def _execute(self, rank: CairnConnector, kv: torch.Tensor, output) -> ModelRunnerOutput:
        output.kv_connector_metadata.prefill_tokens = 0  # unmeasured: this model is quicker than any load
        rank.bind_connector_metadata(output.kv_connector_metadata)
        rank.start_load_kv(None)
        sampled = self._forward(kv, output)
        rank.wait_for_save()
        _, received = rank.get_finished(output.finished_req_ids)
        told = KVConnectorOutput(
            finished_recving=received,
            invalid_block_ids=rank.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=rank.build_connector_worker_meta(),
        )
        rank.clear_connector_metadata()
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(ids)},
            sampled_token_ids=[sampled[req_id] for req_id in ids],
            kv_connector_output=told,
        )

    def _forward(self, kv: torch.Tensor, output) -> dict[str, list[int]]:
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.resumed += len(cached.resumed_req_ids)
        sampled = {}
        for req_id, new in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[req_id]
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(req_id)
            start, tokens = computed[req_id], request.all_token_ids
            state = _read(kv, blocks, start - 1) if start else 0
            for p in range(start, start + new):
                state = after(state, tokens[p])
                kv[:, blocks[p // BLOCK], 0, p % BLOCK] = state
            sampled[req_id] = [state % 40_000] if start + new == len(tokens) else []
        return sampled

    def stop(self) -> None:
        """At rest, with the books in order; gives the disk folder back.  Idempotent."""
        if self.ranks:
            self.run()
            self.check()
            self.close()

    def check(self) -> None:
        """At rest nothing is held: no lease, no slot on its way, no block."""
        assert not self.scheduler.has_requests()
        self.half.store.check()
        assert not self.half.store.busy
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "a leaked block"

    def close(self) -> None:
        for rank in self.ranks:
            rank.shutdown()
        self.ranks = []
        self.scheduler.shutdown()


def _read(kv: torch.Tensor, blocks: list[int], p: int) -> int:
    """The state at a position; every layer and every lane of its page must say the same."""
    page = kv[:, blocks[p // BLOCK], 0, p % BLOCK]
    assert bool((page == page[0, 0]).all()), "a torn page"
    return int(page[0, 0])
