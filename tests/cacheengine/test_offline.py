"""transfer_config: what vllm.LLM takes, checked before an engine is started for nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cacheengine import ConfigError, transfer_config


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Of this machine; and none that a test leaves behind."""
    monkeypatch.delenv("CAIRN_CONFIG", raising=False)
    monkeypatch.setenv("CAIRN_REDIS_URL", "")


def test_importing_it_loads_neither_torch_nor_vllm_nor_a_redis_client():
    code = "import sys, cacheengine; sys.exit(bool({'torch', 'vllm', 'redis', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_says_all_that_vllm_must_know():
    config = transfer_config(chunk_tokens=128, host_bytes="1GiB", disk_path=Path("/nvme"))
    assert config == {
        "kv_connector": "CairnConnector",
        "kv_connector_module_path": "cacheengine.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"chunk_tokens": 128, "host_bytes": "1GiB", "disk_path": "/nvme"},
    }
    json.dumps(config)


def test_a_knob_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'host_bytes'"):
        transfer_config(host_byte="1GiB")


def test_a_value_that_cannot_be_is_refused_without_being_repeated():
    with pytest.raises(ConfigError, match="chunk_tokens") as caught:
        transfer_config(chunk_tokens="hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["redis_url", "remote_url"])
def test_a_redis_url_goes_into_the_environment_and_not_into_what_vllm_logs(name):
    program = f"""
import os
from cacheengine import transfer_config
config = transfer_config({name}="redis://:hunter2@h:6379/0")
assert "hunter2" not in repr(config), config
assert os.environ["CAIRN_REDIS_URL"] == "redis://:hunter2@h:6379/0"
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_mistake_in_the_environment_is_found_too(monkeypatch):
    monkeypatch.setenv("CAIRN_HOST_BYTES", "a lot")
    with pytest.raises(ConfigError, match="host_bytes"):
        transfer_config()


def test_what_is_not_given_is_left_to_the_environment(monkeypatch):
    monkeypatch.setenv("CAIRN_CHUNK_TOKENS", "128")
    assert transfer_config(disk_path=None)["kv_connector_extra_config"] == {}
