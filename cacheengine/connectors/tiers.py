"""From configuration and layout to tiers and their sizes: the same arithmetic in scheduler and ranks."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vllm.platforms import current_platform

from cacheengine.arena import PAGE
from cacheengine.codecs import CODECS, RAW, Codec, page_of
from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.demoter import Write
from cacheengine.layout import KVLayout
from cacheengine.tier import Tier
from cacheengine.tiers.disk import DiskTier, slots_in
from cacheengine.tiers.encoded import Encoded
from cacheengine.tiers.redis import RedisTier
from cacheengine.tiers.stats import TierStats
from cacheengine.tiers.wrap import Breaker

# A rank's loaders, each with a batch of its own: one verifies while the other reads.  The disk tier has
# threads for each device besides.
IO_THREADS = 2


def host_slots(config: CacheConfig, layout: KVLayout) -> int:
    """Raises ConfigError when not even one chunk fits."""
    stride = -(-layout.payload_bytes // PAGE) * PAGE
    slots = int(config.host_bytes) // stride
    if slots < 1:
        raise ConfigError(f"host_bytes={int(config.host_bytes)} holds no chunk of {stride} bytes; raise it")
    return slots


def lossy_codecs(config: CacheConfig) -> str:
    """Codecs that change KV in the tiers this worker has, as text; empty for an exact worker."""
    tiers = (("disk", config.disk_path, config.disk_codec), ("redis", config.redis_url, config.redis_codec))
    return " ".join(f"{tier}={codec}" for tier, used, codec in tiers if used and codec != RAW)


def codec_of(name: str, layout: KVLayout) -> Codec | None:
    """None for raw, which needs nobody's help.  Raises ConfigError where KV cannot be coded so."""
    if name == RAW:
        return None
    page = page_of(layout.name, layout.heads, layout.block_tokens, layout.block_bytes, layout.dtype)
    if page is None:
        raise ConfigError(
            f"codec {name!r} needs to know where K and V lie in a page, and of layout {layout.name} with "
            f"{layout.dtype} KV nothing is proved; use raw"
        )
    return CODECS[name](page)


def stored_bytes(name: str, layout: KVLayout) -> int:
    """Bytes of a whole chunk in a tier with this codec.  Raises as codec_of()."""
    codec = codec_of(name, layout)
    return codec.encoded_bytes(layout.payload_bytes) if codec else layout.payload_bytes


def disk_slots(config: CacheConfig, layout: KVLayout) -> int:
    """Raises ConfigError when not even one chunk fits."""
    stored = stored_bytes(config.disk_codec, layout)
    slots = slots_in(int(config.disk_bytes), stored, len(disk_folders(config)))
    if slots < 1:
        raise ConfigError(f"disk_bytes={int(config.disk_bytes)} holds no chunk of {stored} bytes; raise it")
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
        stored_bytes(config.redis_codec, layout),
        layout.chunk_tokens,
        layout.dtype,
        layout.name,
        rank,
        world,
        worker_id(config),
        config.redis_ttl_seconds,
        config.redis_timeout_ms,
        connections=IO_THREADS + 1,  # and one writer
        codec=config.redis_codec,
    )


def lower_tiers(
    config: CacheConfig, layout: KVLayout, model: str, rank: int, world: int
) -> Iterator[tuple[Breaker, TierStats]]:
    """What one rank's mover reads from and writes to, each behind its own breaker, and its counters."""
    if config.disk_path:
        disk = DiskTier(
            disk_folders(config),
            int(config.disk_bytes),
            stored_bytes(config.disk_codec, layout),
            layout.scheme.namespace,
            layout.chunk_tokens,
            rank,
            world,
            config.disk_codec,
        )
        yield Breaker(_encoded(disk, config.disk_codec, config, layout)), disk.stats
    if config.redis_url:
        redis = redis_tier(config, layout, model, rank, world)
        yield Breaker(_encoded(redis, config.redis_codec, config, layout)), redis.stats


def _encoded(tier: Tier, name: str, config: CacheConfig, layout: KVLayout) -> Tier:
    codec = codec_of(name, layout)
    if codec is None:
        return tier
    return Encoded(tier, codec, layout.payload_bytes, IO_THREADS + 1)  # and one writer
