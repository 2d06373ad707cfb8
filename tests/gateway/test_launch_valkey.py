"""The bundled Valkey, for real."""

import stat

import pytest
import redis

from gateway.launch import probe, state
from gateway.launch.checks import redis_sentence
from gateway.launch.processes import Child, wait_ready
from gateway.launch.valkey import Valkey

pytestmark = pytest.mark.e2e


@pytest.fixture
def bundled(tmp_path):
    valkey = Valkey.fresh(64 << 20)
    child = Child(valkey.spec(tmp_path, tmp_path / "valkey.log"))
    child.start()
    wait_ready([child], lambda c: None)
    yield valkey, child
    child.stop()


def test_it_answers_with_its_password_only(bundled):
    valkey, _ = bundled
    with redis.Redis.from_url(valkey.url) as client:
        assert client.ping()
    with redis.Redis(port=valkey.port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_it_is_a_bounded_cache_without_persistence(bundled):
    valkey, _ = bundled
    with redis.Redis.from_url(valkey.url) as client:
        settings = client.config_get("maxmemory", "maxmemory-policy", "save", "appendonly", "bind")
    assert settings == {
        "maxmemory": str(64 << 20),
        "maxmemory-policy": "allkeys-lru",
        "save": "",
        "appendonly": "no",
        "bind": "127.0.0.1",
    }


def test_the_password_is_in_no_argv_and_no_file(bundled, tmp_path):
    valkey, child = bundled
    assert valkey.password not in " ".join(child.spec.argv)
    assert all(
        valkey.password.encode() not in path.read_bytes() for path in tmp_path.iterdir() if path.is_file()
    )


def test_two_never_share_a_password():
    assert Valkey.fresh(1).password != Valkey.fresh(1).password


def test_the_doctor_reads_its_facts(bundled):
    valkey, _ = bundled
    info, error = probe.redis_info(valkey.url)
    assert error == ""
    assert info["maxmemory_policy"] == "allkeys-lru"
    assert probe.valkey_version()


def test_an_outside_redis_that_answers_is_accepted(bundled):
    assert redis_sentence(bundled[0].url) == ""


def test_an_outside_redis_that_does_not_answer_is_a_sentence_without_its_password():
    said = redis_sentence("redis://:hunter2@127.0.0.1:1/0")
    assert "does not answer" in said
    assert "hunter2" not in said


@pytest.mark.e2e
@pytest.mark.parametrize("servers", ["cluster", "sentinels"])
def test_an_outside_cluster_or_sentinel_is_accepted(request, servers):
    url = request.getfixturevalue(servers).url
    assert redis_sentence(url) == ""
    info, error = probe.redis_info(url)
    assert (error, info["maxmemory"]) == ("", 0)


@pytest.mark.parametrize("url", ["redis-cluster://:hunter2@127.0.0.1:1", "redis-sentinel://127.0.0.1:1/kv"])
def test_an_outside_cluster_or_sentinel_that_is_away_is_a_sentence(url):
    said = redis_sentence(url)
    assert "does not answer" in said
    assert "hunter2" not in said


def test_something_that_is_no_redis_url_is_a_sentence():
    assert "redis://host:6379/0" in redis_sentence("localhost:6379")


def test_the_note_of_a_stack_is_for_its_owner_only(tmp_path):
    with state.owned(tmp_path):
        state.write(tmp_path, state.Stack(pid=1, url="u", redis_url="secret"))
        assert stat.S_IMODE((tmp_path / "run" / "stack.json").stat().st_mode) == 0o600
