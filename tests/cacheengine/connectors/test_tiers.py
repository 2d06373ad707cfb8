"""From configuration to the tiers' sizes and places."""

from pathlib import Path

import pytest

from cacheengine.config import CacheConfig, ConfigError
from cacheengine.connectors.tiers import disk_folders


def test_disk_path_names_one_folder_or_several():
    assert disk_folders(CacheConfig(disk_path="/mnt/a")) == (Path("/mnt/a"),)
    assert disk_folders(CacheConfig(disk_path="/mnt/a, ~/b,")) == (Path("/mnt/a"), Path.home() / "b")


def test_a_disk_path_of_commas_is_refused():
    with pytest.raises(ConfigError, match="names no folder"):
        disk_folders(CacheConfig(disk_path=" , "))
