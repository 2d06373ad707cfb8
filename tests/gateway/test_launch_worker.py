"""The worker's command line and environment."""

import json

import pytest

from gateway.launch.probe import policy_of, transfer_text
from gateway.launch.worker import WorkerSpec, command, core_lists, environment


@pytest.fixture
def spec(tmp_path) -> WorkerSpec:
    return WorkerSpec(
        model=str(tmp_path),
        port=8001,
        served_name="m",
        redis_url="redis://:hunter2@localhost/0",
        cache={"worker_id": "w1"},
        extra=("--block-size", "64"),
    )


def test_a_failed_load_is_always_recomputed(spec):
    assert policy_of(transfer_text(list(command(spec)))) == "recompute"


def test_the_connector_is_named_with_its_module_and_the_caches_own_settings(spec):
    config = json.loads(transfer_text(list(command(spec))))
    assert config["kv_connector"] == "CairnConnector"
    assert config["kv_connector_module_path"] == "cacheengine.connectors.vllm"
    assert config["kv_connector_extra_config"] == {"worker_id": "w1"}


def test_the_redis_url_is_in_the_environment_and_never_in_argv(spec):
    assert "hunter2" not in " ".join(command(spec))
    assert environment(spec, {})["CAIRN_REDIS_URL"] == spec.redis_url


def test_what_vllm_knows_is_passed_on_untouched(spec):
    assert command(spec)[-2:] == ("--block-size", "64")


def test_plain_vllm_has_no_connector(spec):
    assert "--kv-transfer-config" not in command(spec, connector=False)


def test_nothing_is_reported_to_anybody(spec):
    env = environment(spec, {})
    assert (env["VLLM_NO_USAGE_STATS"], env["DO_NOT_TRACK"], env["HF_HUB_OFFLINE"]) == ("1", "1", "1")


def test_a_person_who_sets_vllms_own_variables_is_obeyed(spec):
    env = environment(spec, {"VLLM_CPU_KVCACHE_SPACE": "8", "VLLM_CPU_NUM_OF_RESERVED_CPU": "2"})
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["VLLM_CPU_NUM_OF_RESERVED_CPU"]) == ("8", "2")


@pytest.mark.parametrize(
    ("cores", "workers", "lists"),
    [
        ([0, 1], 1, [""]),
        ([0, 1], 2, ["0", "1"]),
        ([0, 1], 3, ["0", "1", "0"]),
        ([0, 1, 2, 3, 4], 2, ["0,1", "2,3"]),
        ([], 2, ["", ""]),
    ],
)
def test_several_workers_do_not_share_cores_while_there_are_enough(cores, workers, lists):
    assert core_lists(cores, workers) == lists
