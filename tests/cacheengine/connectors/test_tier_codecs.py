"""The arithmetic that scheduler and ranks must agree on, with codecs."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.tiers import codec_of, disk_slots, lossy_codecs, lower_tiers, stored_bytes
from cacheengine.layout import KVLayout
from cacheengine.tiers.disk import DiskTier
from cacheengine.tiers.encoded import Encoded
from tests.cacheengine.tiers.kit import buffer, ref

LAYOUT = KVLayout(2, 128, 98_304, 256, "bfloat16", "LBHNC/amx", {"heads": "3x64/64"}, heads=3)


def config(path: Path | str = "", **fields: object) -> CacheConfig:
    return CacheConfig.load(env={}, disk_path=str(path), disk_bytes="4MiB", **fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, ""),
        ({"disk_codec": "fp8"}, "disk=fp8"),
        ({"redis_codec": "fp8"}, ""),  # there is no redis tier
        ({"disk_codec": "k16v8", "redis_codec": "fp8", "redis_url": "redis://h"}, "disk=k16v8 redis=fp8"),
    ],
)
def test_only_a_lossy_codec_of_a_tier_in_use_changes_the_namespace(fields: dict[str, str], text: str) -> None:
    assert lossy_codecs(config("/somewhere", **fields)) == text


def test_raw_needs_nobody_s_help(tmp_path: Path) -> None:
    assert codec_of("raw", replace(LAYOUT, name="new/unheard of", heads=0)) is None
    assert stored_bytes("raw", LAYOUT) == LAYOUT.payload_bytes
    ((breaker, _),) = lower_tiers(config(tmp_path), LAYOUT, "m", 0, 1)
    assert type(breaker.inner) is DiskTier
    breaker.close()


@pytest.mark.parametrize("name", ["fp8", "k16v8"])
@pytest.mark.parametrize(
    "unknown", [{"name": "LBHNC/neon"}, {"name": "BHLNC/cuda"}, {"heads": 0}, {"dtype": "uint8"}], ids=str
)
def test_a_lossy_codec_refuses_a_layout_of_which_nothing_is_proved(
    name: str, unknown: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=f"codec '{name}' needs to know where K and V lie.*use raw"):
        stored_bytes(name, replace(LAYOUT, **unknown))  # type: ignore[arg-type]


def test_a_codec_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="disk_codec: Input should be 'raw', 'fp8' or 'k16v8'"):
        config(disk_codec="int3")


def test_smaller_chunks_are_more_slots() -> None:
    slots = {name: disk_slots(config("/d", disk_codec=name), LAYOUT) for name in ("raw", "k16v8", "fp8")}
    assert slots["raw"] < slots["k16v8"] < slots["fp8"] <= 2 * slots["raw"] + 1


def test_a_rank_s_disk_tier_stores_encoded_chunks(tmp_path: Path) -> None:
    ((breaker, stats),) = lower_tiers(config(tmp_path, disk_codec="k16v8"), LAYOUT, "m", 0, 1)
    assert type(breaker.inner) is Encoded
    words = (0x3F80 | random.Random(1).randrange(128) for _ in range(LAYOUT.payload_bytes // 2))
    data = buffer(LAYOUT.payload_bytes, b"".join(word.to_bytes(2, "little") for word in words))
    into = buffer(LAYOUT.payload_bytes)
    assert breaker.write([ref(0)], [data]) == 1
    assert breaker.read([ref(0)], [into]) == 1
    assert stats.bytes_written == stored_bytes("k16v8", LAYOUT) < 0.76 * LAYOUT.payload_bytes
    assert into != data
    assert into[: 2 * 128 * 64] == data[: 2 * 128 * 64]  # the first head's K
    breaker.close()
