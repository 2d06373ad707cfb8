import pytest

from gateway.launch.errors import LaunchError
from loadtests.engine import BenchFailed, cores, proof, sentence_on_failure, totals, without_ours

NOTHING = {"device": 0.0, "host": 0.0, "disk": 0.0, "redis": 0.0}


def test_a_cold_prompt_came_from_nowhere():
    assert proof("", NOTHING, 3000) == ""
    assert "came from elsewhere than nowhere" in proof("", {**NOTHING, "host": 256.0}, 3000)


@pytest.mark.parametrize(
    ("claim", "tokens"), [("host", 2944), ("disk", 2944), ("redis", 2944), ("device", 2944)]
)
def test_a_warm_prompt_came_whole_from_its_tier(claim, tokens):
    assert proof(claim, {**NOTHING, claim: tokens}, 3000) == ""
    assert proof(claim, {**NOTHING, claim: tokens + 100}, 3000) == ""  # a tail may be kept as well
    assert proof(claim, {**NOTHING, claim: tokens - 128}, 3000) != ""
    assert proof(claim, NOTHING, 3000) != ""


def test_a_prompt_that_came_from_two_tiers_proves_neither():
    assert "host" in proof("disk", {**NOTHING, "disk": 2944.0, "host": 256.0}, 3000)


def test_one_token_is_always_computed():
    assert proof("host", {**NOTHING, "host": 384.0}, 512) == ""


def test_series_are_summed_over_all_labels_but_the_tier():
    exposition = """# HELP cairn_engine_hit_tokens_total Prompt tokens loaded from a tier.
# TYPE cairn_engine_hit_tokens_total counter
cairn_engine_hit_tokens_total{engine="0",model_name="m",tier="host"} 256.0
cairn_engine_hit_tokens_total{engine="1",model_name="m",tier="host"} 512.0
cairn_engine_hit_tokens_total{engine="0",model_name="m",tier="disk"} 1.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0"} 3.0
"""
    found = totals(exposition)
    assert found["cairn_engine_hit_tokens_total host"] == 768
    assert found["cairn_engine_hit_tokens_total disk"] == 1
    assert found["vllm:prefix_cache_hits_total"] == 3


def test_a_stack_beside_the_bench_does_not_leak_into_it():
    env = {"CAIRN_REDIS_URL": "redis://other", "CAIRN_DISK_PATH": "/x", "HOME": "/h"}
    assert without_ours(env) == {"HOME": "/h"}


def test_some_core_computes():
    assert all(part.isdecimal() for part in cores().split(","))


@pytest.mark.parametrize(
    "error", [BenchFailed("w1 said no"), LaunchError("w1 said no"), ValueError("w1 said no")]
)
def test_a_bench_that_cannot_measure_says_why_and_exits_with_2(error, capsys):
    def bench() -> int:
        raise error

    assert sentence_on_failure(bench) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "w1 said no"
