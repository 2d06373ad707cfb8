"""vLLM's configuration read once: the layout of a chunk, and the reasons to keep our hands off."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import parse_id_list
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from cacheengine.config import CacheConfig
from cacheengine.connectors.tiers import lossy_codecs
from cacheengine.layout import KVLayout, weights_fingerprint

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


_WHERE_FROM = {"_name_or_path", "transformers_version"}


def why_not(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: CacheConfig) -> str | None:
    """One sentence when this engine cannot be cached safely; None when it can."""
    if not current_platform.is_cpu():
        return f"moving KV on {current_platform.device_type} has not been proved on hardware yet"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return (
            f"the model has {len(groups)} KV cache groups; only one group of full attention is cached so far"
        )
    spec = groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec):
        return f"the model's KV cache is {type(spec).__name__}; only full attention is cached so far"
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is not supported yet"
    if parallel.decode_context_parallel_size > 1:
        return "decode context parallelism is not supported yet"
    model = vllm_config.model_config
    if not (config.weights_fingerprint or Path(model.model).is_dir() or _commit(model)):
        return (
            f"nothing proves which weights {model.model!r} is; serve it from a local folder, "
            "or name them with weights_fingerprint"
        )
    return None


def layout_of(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: CacheConfig) -> KVLayout:
    """REQUIRES why_not() is None.  Everything that changes what KV bytes mean ends up in the facts."""
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    assert isinstance(spec, FullAttentionSpec)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    isa = current_platform.device_type
    if current_platform.is_cpu():
        isa = _get_attn_isa(spec.dtype, spec.block_size, spec.head_size, cache.cache_dtype)
    text = model.hf_text_config.to_dict()
    facts = {
        "weights": config.weights_fingerprint or weights_fingerprint(model.model, _commit(model)),
        # as vLLM uses it, overrides included; where it came from does not matter
        "config": json.dumps(
            {k: v for k, v in text.items() if k not in _WHERE_FROM}, sort_keys=True, default=str
        ),
        "model_dtype": model.dtype,
        "quantization": model.quantization,
        "cache_dtype": cache.cache_dtype,
        "heads": f"{spec.num_kv_heads}x{spec.head_size}/{spec.head_size_v}",
        "window": f"{spec.sliding_window}/{spec.attention_chunk_size}",
        # some ropes scale with the length the server allows
        "max_model_len": "" if _plain_rope(text) else model.max_model_len,
        "tensor_parallel": parallel.tensor_parallel_size,
        "backend": vllm_config.attention_config.backend,
        "vllm": vllm.__version__,
    }
    if lossy := lossy_codecs(config):
        facts["codecs"] = lossy
    # MLA keeps one latent for both, and a page of unequal K and V does not halve
    halves = not isinstance(spec, MLAAttentionSpec) and spec.head_size == spec.head_size_v
    return KVLayout(
        layers=len(group.layer_names),
        block_tokens=spec.block_size,
        block_bytes=spec.page_size_bytes,
        chunk_tokens=config.chunk_tokens,
        dtype=str(spec.dtype).removeprefix("torch."),
        name=f"{kv_cache_config.kv_cache_layout}/{isa}",
        facts=facts,
        heads=spec.num_kv_heads if halves else 0,
    )


def _commit(model: "ModelConfig") -> str | None:
    return getattr(model.hf_config, "_commit_hash", None)


def _plain_rope(text: Mapping[str, Any]) -> bool:
    """No scaling that anything but the configuration decides."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return (
        set(scaling) <= {"rope_theta", "rope_type", "type"}
        and scaling.get("rope_type", "default") == "default"
    )


def served_name(vllm_config: "VllmConfig") -> str:
    """The model's name as clients say it."""
    name: Any = vllm_config.model_config.served_model_name or vllm_config.model_config.model
    return str(name[0] if isinstance(name, list) else name)


def compute_cores() -> frozenset[int]:
    """Cores that all ranks of this worker compute on, where vLLM was told ("0-7|8-15"); empty where it chose
    for itself: then each rank sits on a NUMA node of its own."""
    dealt = envs.VLLM_CPU_OMP_THREADS_BIND
    if dealt in ("auto", "nobind"):
        return frozenset()
    return frozenset(core for rank in dealt.split("|") for core in parse_id_list(rank))
