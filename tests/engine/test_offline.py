"""vllm.LLM without a server: what one process computed, the next one reuses, from its disk or from Redis."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.launch.worker import WorkerSpec, environment

CHUNK = 128
PROGRAM = Path(__file__).parent / "offline_program.py"


@pytest.fixture(scope="module")
def prompt() -> str:
    return "\n".join(pydoc_data.topics.topics.values())[:4000]


def run(model: Path, prompt: str, log: Path, env: dict[str, str], **job: Any) -> dict[str, Any]:
    """One life of a program that uses the engine; what it printed last."""
    spec = WorkerSpec(str(model), 0, "smol", cores="0")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    with log.open("a") as errors:
        done = subprocess.run(
            [sys.executable, str(PROGRAM)],
            input=json.dumps({"model": str(model), "prompt": prompt, **job}),
            env=environment(spec, inherited) | env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
            timeout=240,
        )
    with log.open("a") as out:
        out.write(done.stdout)  # where vLLM logs
    assert done.returncode == 0, log.read_text()[-8000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]  # vLLM may have the last word
    return dict(json.loads(said[-1]))


def test_a_second_process_reuses_what_the_first_computed(model, prompt, valkey_module, tmp_path):
    url = f"redis://:hunter2@127.0.0.1:{valkey_module.port}/0"
    log = tmp_path / "log"
    with valkey_module.client() as client:
        client.config_set("requirepass", "hunter2")
        client.execute_command("AUTH", "hunter2")
        try:
            by_env = {
                "CAIRN_CHUNK_TOKENS": str(CHUNK),
                "CAIRN_HOST_BYTES": "128MiB",
                "CAIRN_DISK_PATH": str(tmp_path / "disk"),
                "CAIRN_DISK_BYTES": "256MiB",
                "CAIRN_REDIS_URL": url,
            }
            first = run(model, prompt, log, by_env, knobs={}, redis_url=url, wait_chunks=True)
            assert first["cached"] == 0
            # the same, as arguments; and a third time on a machine with another disk
            knobs = {"chunk_tokens": CHUNK, "host_bytes": "128MiB", "disk_bytes": "256MiB", "redis_url": url}
            for folder, source in (("disk", "disk"), ("other", "redis")):
                again = run(model, prompt, log, {}, knobs=knobs | {"disk_path": str(tmp_path / folder)})
                assert again["tokens"] == first["tokens"], source
                assert again["cached"] >= (first["prompt"] - 1) // CHUNK * CHUNK, source
        finally:
            client.config_set("requirepass", "")
    assert "hunter2" not in log.read_text()
