"""From configuration to the tiers' sizes and places."""

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.tiers import IO_THREADS, disk_folders, redis_tier
from cacheengine.layout import KVLayout
from cacheengine.tier import Ref
from tests.conftest import ValkeyServer


def test_disk_path_names_one_folder_or_several():
    assert disk_folders(CacheConfig(disk_path="/mnt/a")) == (Path("/mnt/a"),)
    assert disk_folders(CacheConfig(disk_path="/mnt/a, ~/b,")) == (Path("/mnt/a"), Path.home() / "b")


def test_a_disk_path_of_commas_is_refused():
    with pytest.raises(ConfigError, match="names no folder"):
        disk_folders(CacheConfig(disk_path=" , "))


def test_the_writer_has_a_connection_while_every_loader_uses_one(valkey: ValkeyServer):
    layout = KVLayout(2, 16, 2048, 32, "float32", "test", {"model": "tiers"})
    config = CacheConfig(chunk_tokens=32, redis_url=valkey.url)
    tier = redis_tier(config, layout, "m", 0, 1)
    try:
        with ExitStack() as loaders:
            for _ in range(IO_THREADS):
                loaders.enter_context(tier._pool.session(time.monotonic() + 60))
            chunk = memoryview(bytearray(layout.payload_bytes))
            assert tier.write([Ref(layout.scheme.keys(range(32))[0])], [chunk]) == 1
    finally:
        tier.close()
