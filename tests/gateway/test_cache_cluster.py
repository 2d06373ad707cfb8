"""`cairn lookup|inspect|warm|pin|unpin|clear` on a real Cluster, where no two keys need be on one node."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from typer.testing import CliRunner, Result

from cacheengine.keys import ChunkKey
from cacheengine.wishes import names_of
from gateway.cache_view import connect
from gateway.cli import app
from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.cache_rig import MODEL, NS, SCHEME, CacheWorker
from tests.servers import Cluster

pytestmark = pytest.mark.e2e

PROMPTS = [list(range(1000 * n, 1000 * n + 16 * 5 + 7)) for n in range(1, 9)]
FAMILIES = [SCHEME.keys(ids) for ids in PROMPTS]
Cairn = Callable[..., Result]


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[CacheWorker]:
    cluster.flush()
    worker = CacheWorker(cluster.url)
    for keys in FAMILIES:
        worker.hold(keys)
        worker.share(keys)
    wait_until(lambda: worker.writer.stats.written >= 5 * len(FAMILIES))
    yield worker
    worker.close()


@pytest.fixture
def cairn(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cairn:
    for name in [name for name in os.environ if name.startswith("CAIRN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CAIRN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CAIRN_REDIS_URL", cluster.url)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


def said(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def ids_of(folder: Path, n: int) -> Path:
    path = folder / f"{n}.json"
    path.write_text(json.dumps(PROMPTS[n]))
    return path


def expiries(cluster: Cluster, keys: list[ChunkKey]) -> set[bool]:
    """Whether blobs of these chunks expire."""
    with connect(cluster.url) as client:
        return {client.ttl(name) > 0 for key in keys for name in client.scan_iter(f"*{key.hex()}*")}


def test_the_chunks_of_the_test_are_on_every_node(cluster: Cluster, worker: CacheWorker) -> None:
    with connect(cluster.url) as client:
        blobs = [bytes(name) for name in client.scan_iter("*@1@0@*")]
    assert {key_slot(name) * 3 // 16384 for name in blobs} == {0, 1, 2}
    assert {name.endswith(b"_bytes") for name in blobs} == {True, False}


def test_lookup_and_inspect_ask_the_node_that_knows(
    cairn: Cairn, worker: CacheWorker, tmp_path: Path
) -> None:
    for n, keys in enumerate(FAMILIES):
        ((row,),) = [
            part["workers"] for part in said(cairn("lookup", "--tokens", ids_of(tmp_path, n), "--json"))
        ]
        assert (row["hit"], row["host"], row["redis"]) == (5, 5, 5)
        ((row,),) = [part["workers"] for part in said(cairn("lookup", "--key", keys[2].hex(), "--json"))]
        assert (row["chunks"], row["host"]) == (1, 1)  # by its name alone
    (fact,) = said(cairn("inspect", FAMILIES[3][4].hex(), "--json"))
    assert fact["held"] == {"w1": ["host"]}
    assert [blob["verdict"] for blob in fact["blobs"]] == ["whole"]


def test_pin_and_unpin_reach_the_worker_and_every_blob(
    cairn: Cairn, worker: CacheWorker, cluster: Cluster, tmp_path: Path
) -> None:
    for n, keys in enumerate(FAMILIES[:3]):
        assert said(cairn("pin", "--tokens", ids_of(tmp_path, n), "--json"))
        assert expiries(cluster, keys) == {False}
    assert worker.pins == {key for keys in FAMILIES[:3] for key in keys}
    assert said(cairn("unpin", "--tokens", ids_of(tmp_path, 0), "--json"))
    assert (expiries(cluster, FAMILIES[0]), expiries(cluster, FAMILIES[1])) == ({True}, {False})
    assert worker.pins == {key for keys in FAMILIES[1:3] for key in keys}


def test_clear_deletes_on_every_node_and_nobody_elses(
    cairn: Cairn, worker: CacheWorker, cluster: Cluster
) -> None:
    with connect(cluster.url) as client:
        strangers = [f"other@1@0@{n:032x}" for n in range(9)]
        for name in strangers:
            client.set(name, "mine")
    result = cairn("clear", "--yes")
    assert result.exit_code == 0, result.output
    assert f"{2 * 5 * len(FAMILIES)} keys of {MODEL} deleted" in result.stdout
    assert worker.cleared == 1
    with connect(cluster.url) as client:
        assert sorted(bytes(name).decode() for name in client.scan_iter("*@1@0@*")) == strangers
        assert client.exists(names_of(NS.hex())[0])


def test_warm_waits_until_the_prompt_is_stored(cairn: Cairn, worker: CacheWorker, tmp_path: Path) -> None:
    with serve(FakeVLLM()) as url:
        result = said(cairn("warm", "--tokens", ids_of(tmp_path, 5), "--url", url, "--json"))
    assert result["stored_chunks"] == 5


def test_a_cluster_that_is_away_is_one_sentence_without_its_password(cairn: Cairn) -> None:
    result = cairn("lookup", "--prompt", "x", "--redis-url", "redis-cluster://:hunter2@127.0.0.1:1")
    assert result.exit_code == 1
    assert "does not answer" in result.stderr
    assert "hunter2" not in result.output
