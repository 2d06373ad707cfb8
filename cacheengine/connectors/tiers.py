"""From configuration and layout to tiers and their sizes: the same arithmetic in scheduler and ranks."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vllm.platforms import current_platform

from cacheengine.arena import PAGE
from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.demoter import Write
from cacheengine.layout import KVLayout
from cacheengine.tiers.disk import DiskTier, slots_in
from cacheengine.tiers.redis import RedisTier
from cacheengine.tiers.stats import TierStats
from cacheengine.tiers.wrap import Breaker


def host_slots(config: CacheConfig, layout: KVLayout) -> int:
    """Raises ConfigError when not even one chunk fits."""
    stride = -(-layout.payload_bytes // PAGE) * PAGE
    slots = int(config.host_bytes) // stride
    if slots < 1:
        raise ConfigError(f"host_bytes={int(config.host_bytes)} holds no chunk of {stride} bytes; raise it")
    return slots


def disk_slots(config: CacheConfig, layout: KVLayout) -> int:
    """Raises ConfigError when not even one chunk fits."""
    slots = slots_in(int(config.disk_bytes), layout.payload_bytes, len(disk_folders(config)))
    if slots < 1:
        raise ConfigError(
            f"disk_bytes={int(config.disk_bytes)} holds no chunk of {layout.payload_bytes} bytes; raise it"
        )
    return slots


def write_mode(config: CacheConfig) -> Write:
    """Writing beside the compute is free where a GPU computes."""
    if config.write != "auto":
        return config.write
    return "idle" if current_platform.is_cpu() else "behind"


def disk_folders(config: CacheConfig) -> tuple[Path, ...]:
    """The folders of `disk_path`; slots are striped over them in this order.  Raises ConfigError for none."""
    named = (name.strip() for name in config.disk_path.split(","))
    folders = tuple(Path(name).expanduser() for name in named if name)
    if not folders:
        raise ConfigError(f"disk_path={config.disk_path!r} names no folder")
    return folders


def worker_id(config: CacheConfig) -> str:
    """The configured name; else the address, which is stable too; else this process."""
    address = urlsplit(config.worker_url).netloc.rpartition("@")[2]
    return config.worker_id or address or f"{socket.gethostname()}-{os.getpid()}"


def redis_tier(config: CacheConfig, layout: KVLayout, model: str, rank: int, world: int) -> RedisTier:
    return RedisTier(
        config.redis_url,
        model,
        layout.scheme.namespace,
        layout.payload_bytes,
        layout.chunk_tokens,
        layout.dtype,
        layout.name,
        rank,
        world,
        worker_id(config),
        config.redis_ttl_seconds,
        config.redis_timeout_ms,
        connections=config.io_threads,
    )


def lower_tiers(
    config: CacheConfig, layout: KVLayout, model: str, rank: int, world: int
) -> Iterator[tuple[Breaker, TierStats]]:
    """What one rank's mover reads from and writes to, each behind its own breaker, and its counters."""
    if config.disk_path:
        disk = DiskTier(
            disk_folders(config),
            int(config.disk_bytes),
            layout.payload_bytes,
            layout.scheme.namespace,
            layout.chunk_tokens,
            rank,
            world,
        )
        yield Breaker(disk), disk.stats
    if config.redis_url:
        redis = redis_tier(config, layout, model, rank, world)
        yield Breaker(redis), redis.stats
