"""The engine without a server: `vllm.LLM(model=…, kv_transfer_config=transfer_config(disk_path=…))`.

Importing this costs no torch, no vLLM and no Redis client.
"""

import os
from collections.abc import Mapping
from typing import Any

from cacheengine.config import ENV_PREFIX, CacheConfig

CONNECTOR = "CairnConnector"
CONNECTOR_MODULE = "cacheengine.connectors.vllm"
_REDIS_URL = ENV_PREFIX + "REDIS_URL"


def transfer_config(**knobs: Any) -> dict[str, Any]:
    """What vLLM calls kv_transfer_config, with CacheConfig's fields (or their aliases) as `knobs`.

    Knobs left out come from CAIRN_* variables.  A failed load is recomputed, never an error: that is not
    optional.  `redis_url` is put into CAIRN_REDIS_URL, which the engine's processes inherit, and not into the
    result: vLLM logs that, and a URL may hold a password.  Raises ConfigError for a knob that does not exist
    or a value that cannot be.
    """
    extra = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in knobs.items()
        if value is not None
    }
    CacheConfig.load(**extra)
    for name in ("redis_url", "remote_url"):
        if url := extra.pop(name, None):
            os.environ[_REDIS_URL] = url
    return as_vllm_reads_it(extra)


def as_vllm_reads_it(extra: Mapping[str, Any]) -> dict[str, Any]:
    """KVTransferConfig's fields; `extra` are CacheConfig's, unchecked and without secrets."""
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra),
    }
