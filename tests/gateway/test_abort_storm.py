"""loadtests.abort_storm, a small one, on processes of the test's own."""

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtests.abort_storm import Plan, storm
from loadtests.mocks import stats
from tests.fakes import wait_until
from tests.gateway.process import started
from tests.servers import free_port, needed

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def mocks(folder: Path, tokenizer: Path, *flags: str, redis_url: str = "") -> Iterator[list[str]]:
    """Two native mock workers; their URLs."""
    needed(shutil.which("g++"), "g++")
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    argv = [sys.executable, "-m", "loadtests.mock_worker", "--ports", ",".join(map(str, ports))]
    argv += ["--folder", str(folder), "--tokenizer", str(tokenizer), *flags]
    env = {**os.environ, "CAIRN_REDIS_URL": redis_url}
    with subprocess.Popen(argv, env=env) as process:

        def healthy() -> bool:
            assert process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                return all(httpx.get(f"{url}/health", trust_env=False).status_code == 200 for url in urls)
            return False

        try:
            wait_until(healthy, 120)
            yield urls
        finally:
            process.terminate()


def test_every_client_that_hangs_up_gives_back_what_it_held(tmp_path: Path, smollm_path: Path) -> None:
    rng = random.Random(7)
    plans = [Plan.draw(rng) for _ in range(300)]
    with (
        mocks(tmp_path, smollm_path, "--decode-rate", "500", "--prefill-rate", "40000") as urls,
        started(tmp_path, *(f"mock={url}" for url in urls), worker_seats=8) as gateway,
    ):
        told = asyncio.run(storm(plans, "127.0.0.1", gateway.port, clients=48))
        assert set(told) == {"head", "body", "sent", "first", "middle", "whole"}
        wait_until(lambda: gateway.inflight() == 0, 60)
        wait_until(lambda: not any(stats(urls)[name] for name in ("running", "waiting")), 60)
        rows = gateway.get("/admin/workers").json()["workers"]
        assert [row["inflight"] for row in rows] == [0, 0]
        workers = stats(urls)
        assert workers["finished"] == told["whole"]
        assert workers["aborted"] == workers["requests"] - told["whole"]
        assert told["first"] + told["middle"] <= workers["aborted"]
        assert workers["aborted"] <= told["sent"] + told["first"] + told["middle"]
