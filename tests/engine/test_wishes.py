"""`cairn` and a real worker: what is pinned stays, what is cleared does not come back from the disk."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from tests.engine.prompts import prompts
from tests.engine.rig import Worker

CHUNK = 128
SLOTS = 10  # chunks of host memory
CHUNK_BYTES = 30 * 2 * 3 * 64 * 2 * CHUNK  # layers, K and V, heads, head size, bf16


@pytest.fixture
def cairn(valkey_module, tmp_path, monkeypatch):
    """cairn(*words) → what it printed as JSON."""
    monkeypatch.setenv("CAIRN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CAIRN_REDIS_URL", valkey_module.url)

    def run(*words: object) -> Any:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout) if "--json" in words else done.stdout

    return run


def test_pins_hold_and_clears_last_on_a_real_worker(start, cairn, valkey_module, tmp_path):
    cache = {
        "worker_id": "w1", "chunk_tokens": CHUNK, "host_bytes": SLOTS * CHUNK_BYTES + (1 << 20),
        "disk_path": str(tmp_path / "disk"), "disk_bytes": "256MiB",
    }  # fmt: skip

    def life(name: str) -> Worker:
        worker = start(name, cache, redis_url=valkey_module.url, args=("--no-enable-prefix-caching",))
        return worker.ready()

    def row(file: Path) -> dict[str, Any]:
        (part,) = cairn("lookup", "--tokens", file, "--json")
        return dict(part["workers"][0])

    worker = life("first")
    by_length = {len(tokens): tokens for tokens in prompts(worker)}
    pinned, others = by_length[640], (by_length[900], by_length[1100])
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(pinned))

    warmed = cairn("warm", "--tokens", ids, "--worker", "w1", "--json")
    assert (warmed["computed_tokens"], warmed["stored_chunks"]) == (640, 5)
    cairn("pin", "--tokens", ids)
    worker.settled("disk", 5)
    for other in others:  # 15 chunks want the other 5 slots
        worker.complete(other, 4)
    assert row(ids)["host"] == 5

    worker.kill()
    with valkey_module.client() as client:
        for name in client.scan_iter("smol@*"):
            client.delete(name)
    worker = life("second")
    held = row(ids)
    assert (held["hit"], held["disk"]) == (5, 5)
    (fact,) = cairn("inspect", cairn("lookup", "--tokens", ids, "--json")[0]["keys"][0], "--json")
    assert fact["pinned"] is True

    assert "deleted" in cairn("clear", "--yes")
    assert row(ids)["hit"] == 0
    worker.kill()
    worker = life("third")
    assert row(ids)["hit"] == 0
    worker.complete(pinned, 4)
    assert worker.hits("disk") + worker.hits("redis") + worker.hits("host") == 0
