"""vLLM's configuration read once: the layout of a chunk, and the reasons to keep our hands off."""

from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cacheengine.config import CacheConfig
from cacheengine.layout import KVLayout, weights_fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def why_not(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> str | None:
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
    text = model.hf_text_config
    facts = {
        "weights": config.weights_fingerprint or weights_fingerprint(model.model, model.revision),
        "model_dtype": model.dtype,
        "quantization": model.quantization,
        "cache_dtype": cache.cache_dtype,
        "heads": f"{spec.num_kv_heads}x{spec.head_size}/{spec.head_size_v}",
        "window": f"{spec.sliding_window}/{spec.attention_chunk_size}",
        "rope": getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None),
        "max_model_len": model.max_model_len
        if "yarn" in str(text).lower() or "dynamic" in str(text).lower()
        else "",
        "tensor_parallel": parallel.tensor_parallel_size,
        "backend": vllm_config.attention_config.backend,
        "vllm": vllm.__version__,
    }
    return KVLayout(
        layers=len(group.layer_names),
        block_tokens=spec.block_size,
        block_bytes=spec.page_size_bytes,
        chunk_tokens=config.chunk_tokens,
        dtype=str(spec.dtype).removeprefix("torch."),
        name=f"{kv_cache_config.kv_cache_layout}/{isa}",
        facts=facts,
    )


def served_name(vllm_config: "VllmConfig") -> str:
    """The model's name as clients say it."""
    name: Any = vllm_config.model_config.served_model_name or vllm_config.model_config.model
    return str(name[0] if isinstance(name, list) else name)
