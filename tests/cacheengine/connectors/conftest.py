"""vLLM's own classes stand in these tests as they are; importing them warns about torch's older corners."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.v1.core.kv_cache_manager
    import vllm.v1.request  # noqa: F401
