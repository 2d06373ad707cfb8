"""What people type into redis-cli to look at the shared tier (docs/operations.md), against real keys."""

import shlex
import subprocess
from typing import Any

import pytest
import redis

from tests.cacheengine.tiers.kit import chunks, key, payload, redis_tier, ref
from tests.servers import cli

MODELS = ("meta-llama/Llama-3.1-70B", "HuggingFaceTB/SmolLM2-135M", 'it\'s "odd" @ all\\')
LLAMA = MODELS[0]
HEX = key(0).hex()
CHUNK = f"{LLAMA}@1@0@{HEX}"


@pytest.fixture
def shell(valkey: Any) -> Any:
    """Run a line of shell in which `rc` is the client at this server; what it printed, as lines."""
    rc = shlex.join(cli(valkey))
    for model in MODELS:
        tier = redis_tier(valkey.url, model=model)
        assert tier.write(*chunks(4)) == 4
        tier.close()
    with valkey.client() as client:
        client.hset("cairn:00:worker:w1", "url", "http://h")
        client.hset("cairn:00:{b0}:b0", "w1@17", 2)

    def run(line: str) -> list[str]:
        done = subprocess.run(["sh", "-ec", line.replace("rc ", rc + " ")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_chunks_and_their_metadata_can_be_counted_and_listed(shell: Any):
    assert shell('rc KEYS "*_bytes" | wc -l') == ["12"]
    assert shell('rc KEYS "*@*@*@*" | grep -v "_bytes" | wc -l') == ["12"]
    assert len(shell('rc KEYS "*_bytes" | head -5')) == 5
    listed = shell('rc KEYS "meta-llama*" | grep -v "_bytes" | head -5')
    assert sorted(listed) == sorted(f"{LLAMA}@1@0@{key(n).hex()}" for n in range(4))


def test_a_chunks_metadata_can_be_read(shell: Any):
    flat = shell(f'rc HGETALL "{CHUNK}"')
    facts = dict(zip(flat[::2], flat[1::2], strict=True))
    assert (facts["model_name"], facts["tokens"], facts["world_size"]) == (LLAMA, "256", "1")


def test_memory_can_be_asked_for(shell: Any):
    (value,) = shell(f'rc MEMORY USAGE "{CHUNK}_bytes"')
    (meta,) = shell(f'rc MEMORY USAGE "{CHUNK}"')
    assert int(value) > len(payload(0)) > int(meta) > 0
    assert any(line.startswith("used_memory:") for line in shell("rc INFO memory"))


def test_the_two_recipes_that_delete_leave_the_index_alone(shell: Any, admin: redis.Redis, valkey: Any):
    assert shell('rc KEYS "*_bytes" | xargs rc DEL') == ["12"]
    tier = redis_tier(valkey.url, model=LLAMA)
    assert tier.prefix([ref(0)]) == 0
    tier.close()
    left = shell('rc KEYS "*@*@*@*" | grep -v "_bytes" | xargs rc DEL')
    assert left == ["11"]  # that look-up took one
    assert admin.dbsize() == 2
