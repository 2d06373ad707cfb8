"""The engine's knobs, and the one loader every process uses.

defaults < YAML file < CAIRN_* environment < flags.  Unknown keys are errors that name the nearest known key.
Nothing else in the tree reads the environment or a configuration file.  docs/config.md is generated from
these fields.
"""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

ENV_PREFIX = "CAIRN_"
CONFIG_FILE_ENV = "CAIRN_CONFIG"
# Spellings people bring from LMCache, and what we call the same thing.
ALIASES = {
    "chunk_size": "chunk_tokens",
    "remote_url": "redis_url",
    "local_disk": "disk_path",
    "max_local_disk_size": "disk_bytes",
    "max_local_cpu_size": "host_bytes",
}
_GIB_ALIASES = {"max_local_cpu_size", "max_local_disk_size"}  # plain numbers there mean GiB
_PLAIN_NUMBER = re.compile(r"\d+(\.\d+)?")


class ConfigError(ValueError):
    """A configuration somebody can fix: one sentence that says what to do."""


CodecName = Literal["raw", "fp8", "k16v8"]  # cacheengine/codecs.py; docs/codecs.md has what each costs
Positive = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Base of every process's configuration: frozen, closed, loadable."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        **flags: Any,
    ) -> Self:
        """Merge file, environment and flags.  Raises ConfigError with one sentence a person can act on."""
        env = os.environ if env is None else env
        path = path or env.get(CONFIG_FILE_ENV) or None
        merged = _translate(_read_yaml(Path(path)) if path else {})
        spelled = [name for name in (*cls.model_fields, *ALIASES) if ENV_PREFIX + name.upper() in env]
        known = [name for name in spelled if ALIASES.get(name, name) in cls.model_fields]
        merged.update(_translate({name: env[ENV_PREFIX + name.upper()] for name in known}))
        merged.update(_translate({k: v for k, v in flags.items() if v is not None}))
        for name in merged:
            if name not in cls.model_fields:
                near = get_close_matches(name, list(cls.model_fields), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown key {name!r}{hint}")
        try:
            return cls(**merged)
        except ValidationError as exc:
            first = exc.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "configuration"
            # the offending value is left out: it may be a secret
            raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not valid YAML: {str(exc).splitlines()[0]}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return {str(k): v for k, v in loaded.items()}


def _translate(given: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in given.items():
        ours = ALIASES.get(name, name)
        if ours in out:
            raise ConfigError(f"{ours} is given twice, once under another name; keep one")
        if name in _GIB_ALIASES and _PLAIN_NUMBER.fullmatch(str(value)):
            value = int(float(value) * (1 << 30))
        out[ours] = value
    return out


class CacheConfig(Config):
    """Knobs of the cache engine inside one vLLM worker."""

    chunk_tokens: Positive = Field(
        256,
        description="Tokens in a chunk, the unit of reuse; a multiple of vLLM's block size. "
        "Leave it alone unless most prompts are shorter than 512 tokens.",
    )
    host_bytes: ByteSize = Field(
        ByteSize(2 << 30),
        description="Host memory arena per rank, in bytes (2GiB, 512MiB …). "
        "Leave it alone until `cairn status` shows the host tier full.",
    )
    disk_path: str = Field(
        "",
        description="Directory of the disk tier; empty turns it off. Use a local NVMe file system. Several, "
        "separated by commas, are striped: one on each device, with equal shares of disk_bytes.",
    )
    disk_bytes: ByteSize = Field(
        ByteSize(4 << 30),
        description="Hard capacity of the disk tier per rank, over all its directories; preallocated. Only "
        "used when disk_path is set.",
    )
    disk_codec: CodecName = Field(
        "raw",
        description="How the disk tier stores KV. raw is exact; fp8 and k16v8 are smaller and change answers "
        "(docs/codecs.md). A lossy codec in any tier gives the worker keys of its own.",
    )
    redis_url: str = Field(
        "",
        description="Redis or Valkey that workers share (redis://, rediss://, unix://, redis-sentinel:// or "
        "redis-cluster://); empty turns the shared tier and the chunk index off. Put it in CAIRN_REDIS_URL, "
        "not in argv, when it holds a password.",
    )
    redis_codec: CodecName = Field(
        "raw", description="How the shared tier stores KV; as disk_codec. Workers that share must agree."
    )
    redis_ttl_seconds: Positive = Field(
        86_400, description="Expiry of shared chunks in seconds. Leave it alone unless models change daily."
    )
    redis_timeout_ms: Positive = Field(
        500, description="Deadline of one Redis operation in milliseconds; later is a miss."
    )
    write: Literal["auto", "behind", "idle", "on_evict", "second_hit"] = Field(
        "auto",
        description="When chunks go to the disk and Redis: behind the compute, in idle moments, or when the "
        "host tier runs full. Chunks that were used again do not wait for idle moments; with second_hit they "
        "are the only ones, which spares a disk or a network that most prompts never read from. auto: idle "
        "where the CPU computes, behind elsewhere.",
    )
    loading: Literal["quicker", "always"] = Field(
        "quicker",
        description="Whether a hit is loaded only as far as that is quicker than computing, by what was "
        "measured, or always. Leave it alone unless computing costs you more than time.",
    )
    eviction: Literal["greedy_dual", "lru", "lfu", "fifo", "mru", "s3fifo"] = Field(
        "greedy_dual",
        description="Who leaves a full tier first. "
        "Leave it alone unless a replay of your own trace says otherwise (loadtests.replay_eviction).",
    )
    tenant_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Largest part of each tier one tenant (cache_salt) may fill; 1 is no limit.",
    )
    ttl_seconds: int = Field(
        0,
        ge=0,
        description="Chunks unused for so many seconds leave the host and disk tiers; 0 keeps them until "
        "room is needed. A restart counts anew, for everything on disk that was not overwritten; what must "
        "not come back is cleared (`cairn clear`). Redis has its own, redis_ttl_seconds.",
    )
    worker_id: str = Field(
        "", description="Stable name of this worker; names its disk folder too. Empty: host name and port."
    )
    worker_url: str = Field("", description="Base URL under which the gateway reaches this worker.")
    weights_fingerprint: str = Field(
        "",
        description="Overrides the fingerprint of the weights that goes into the namespace. "
        "Leave it alone unless equal weights come in different files.",
    )
    verify_loads: bool = Field(
        False,
        description="Re-read every loaded KV page and compare it with what was loaded. For tests.",
    )

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if self.chunk_tokens % 16:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be a multiple of 16")
        return self
