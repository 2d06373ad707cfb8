"""The load test as a user runs it, against a fake worker: locust patches sockets, so it is a process."""

import json
import subprocess
import sys

import pytest

from loadtests.report import ROOT
from tests.fakes import FakeVLLM, refusing_url, serve

pytestmark = pytest.mark.e2e


def load(host: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--host", host]
    command += ["-u", "6", "-r", "6", "-t", "3s", "--only-summary", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_run_ends_with_a_table_and_a_line_of_json():
    worker = FakeVLLM(tokens=5, cached_tokens=4)
    with serve(worker) as url:
        ran = load(url, "--max-tokens", "5")
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout.splitlines()[-1])
    assert line["bench"] == "load"
    assert line["bars"]["failed requests"]["ok"]
    results = line["results"]
    assert results["all answers"] == sum(results[f"{name} answers"] for name in ("Chat", "Rag", "OneOff"))
    assert min(results[f"{name} answers"] for name in ("Chat", "Rag", "OneOff")) > 0
    assert results["all cached tokens"] == 4 * results["all answers"]
    for kind in ("TTFT", "ITL", "E2E"):
        assert kind in ran.stderr  # locust's own table
    asked = [json.loads(body) for _, body in worker.asked]
    assert {ask["model"] for ask in asked} == {"fake"}
    assert {ask["max_tokens"] for ask in asked} == {5}


def test_chats_grow_by_their_answers():
    worker = FakeVLLM(tokens=2)
    with serve(worker) as url:
        assert load(url).returncode == 0
    chats = [
        messages
        for messages in (json.loads(body)["messages"] for _, body in worker.asked)
        if len(messages) > 2
    ]
    assert chats
    for messages in chats:
        assert [m["role"] for m in messages][:3] == ["system", "user", "assistant"]
        assert messages[2]["content"] == "word0word1"


@pytest.mark.parametrize("fault", [{"status": 500}, {"die_after": 1}], ids=["refused", "cut off"])
def test_a_failed_request_fails_the_run(fault):
    with serve(FakeVLLM(**fault)) as url:
        ran = load(url)
    assert ran.returncode == 1
    assert not json.loads(ran.stdout.splitlines()[-1])["bars"]["failed requests"]["ok"]


def test_without_a_gateway_it_says_so():
    ran = load(refusing_url())
    assert ran.returncode == 1
    assert "`make up` first" in ran.stderr
