"""The process's log: what a line says, what it never says, and that it never waits."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.endpoints import ENDPOINTS
from gateway.exchange import Exchange
from gateway.logs import JsonLines, TextLines, Writer, request_line
from gateway.proxy import Client
from tests.fakes import FakeVLLM, refusing_url, serve, wait_until
from tests.servers import free_port

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "a secret of mine"}]}
STREAM = {**BODY, "stream": True}
FIELDS = {
    "ts", "level", "logger", "message", "request_id", "trace_id", "model", "path", "status", "error",
    "worker", "reason", "stream", "prompt_tokens", "expected_cached_tokens", "cached_tokens",
    "completion_tokens", "ttft_ms", "total_ms", "queue_ms", "retries", "tenant", "client_abort",
}  # fmt: skip
FORGED = "2026-01-01T00:00:00.000Z INFO gateway.logs: request status=200"
ATTACKS = [
    f"x\n{FORGED}", f"x\r{FORGED}", f"x\x85{FORGED}", f"x\u2028{FORGED}", f"x\v\f\0{FORGED}",
    "\x1b[2J\x1b]0;owned\x07", "\u202etxt.exe", "\ud800 alone", '"} {"message": "forged"}\n',
]  # fmt: skip


def line(form: logging.Formatter, message: str, raised: Exception | None = None, **fields: Any) -> str:
    what = (type(raised), raised, None) if raised else None
    record = logging.LogRecord("somebody", logging.INFO, "", 0, "%s", (message,), what)
    if fields:
        record.fields = fields
    return form.format(record)


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_nothing_a_client_says_can_look_like_a_line_of_ours(attack: str) -> None:
    for form in (TextLines(), JsonLines()):
        for said in (line(form, attack), line(form, "request", path=attack, model=attack)):
            assert said.isprintable()
    assert json.loads(line(JsonLines(), attack, path=attack)) | {"ts": ""} == {
        "ts": "", "level": "info", "logger": "somebody", "message": attack, "path": attack,
    }  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_an_exceptions_words_cannot_either(attack: str) -> None:
    first, *rest = line(TextLines(), "it failed", ValueError(attack)).split("\n")
    assert all(said.isprintable() and said.startswith("    ") for said in rest)
    assert first.endswith("it failed")
    assert attack in json.loads(line(JsonLines(), "it failed", ValueError(attack)))["exception"]


def test_values_with_spaces_and_quotes_stay_one_value() -> None:
    said = line(TextLines(), "request", path='/v1/a b="c"', worker="http://w:1", stream=True, error=None)
    assert said.endswith(r'request path="/v1/a b=\"c\"" worker=http://w:1 stream=true')


def test_a_line_with_a_mistake_in_it_does_not_fail_who_says_it() -> None:
    out = io.StringIO()
    writer = Writer(out)
    writer.setFormatter(TextLines())
    writer.handle(logging.LogRecord("x", logging.INFO, "", 0, "%d and %d", ("one",), None))
    writer.close()
    assert "%d and %d" in out.getvalue()


class Stuck(io.StringIO):
    """A reader that takes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait()
        return super().write(text)


def test_a_reader_that_is_stuck_costs_lines_and_no_time() -> None:
    out = Stuck()
    writer = Writer(out, max_waiting=10)
    writer.setFormatter(TextLines())
    for n in range(100):  # would never come to an end
        writer.handle(logging.LogRecord("x", logging.INFO, "", 0, "line %d", (n,), None))
    assert not out.getvalue()
    out.free.set()
    wait_until(lambda: "lines were dropped" in out.getvalue())
    writer.close()
    lost = 100 - out.getvalue().count(": line ")
    assert f"{lost} lines were dropped" in out.getvalue()
    assert 88 <= lost <= 90


def test_a_request_that_came_to_nothing_has_its_line_too(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange(Client({"headers": []}, None, None), ENDPOINTS[CHAT], CHAT, time.perf_counter())  # type: ignore[arg-type]
    exchange.aborted = True
    with caplog.at_level(logging.INFO, "gateway.logs"):
        request_line(exchange)
    (record,) = caplog.records
    said = json.loads(JsonLines().format(record))
    assert set(said) == FIELDS
    assert (said["status"], said["client_abort"], said["worker"]) == (499, True, None)


# -- a real process


@contextlib.contextmanager
def process(folder: Path, *urls: str, **env: str) -> Iterator[tuple[httpx.Client, Path]]:
    """`cairn gateway` in front of these workers; its client and its log."""
    log, port = folder / "log", free_port()
    knobs = {"CAIRN_WORKERS": ",".join(f"fake={url}" for url in urls), **env}
    with log.open("wb") as out:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "gateway.launch.serve", json.dumps({"port": port})],
            env={**os.environ, **knobs}, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_until(lambda: _ready(client) or gateway.poll() is not None, 60)
            assert gateway.poll() is None, log.read_text()
            yield client, log
        gateway.terminate()
        assert gateway.wait(60) == 0
    finally:
        gateway.kill()
        gateway.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.e2e
def test_every_line_of_the_process_is_json_and_one_is_for_each_request(tmp_path: Path) -> None:
    # a collector that is not there is another one that logs
    env = {"CAIRN_LOG_FORMAT": "json", "OTEL_EXPORTER_OTLP_ENDPOINT": refusing_url()}
    env["CAIRN_ADMIN_PORT"] = str(free_port())  # another server, with the same log
    with serve(FakeVLLM(cached_tokens=7)) as a, process(tmp_path, a, **env) as (client, log):
        for body in (BODY, STREAM, {**BODY, "model": f"x\n{FORGED}"}):
            client.post(CHAT, json=body, headers={"authorization": "Bearer sk-not-for-you"})
        client.get("/health/live")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("listening on" in line["message"] for line in lines)
    assert "Finished server process" in lines[-1]["message"]  # nothing is lost on the way out
    plain, stream, refused = [line for line in lines if line["message"] == "request"]
    assert set(plain) == FIELDS
    assert (plain["status"], plain["model"], plain["path"], plain["stream"]) == (200, "fake", CHAT, False)
    assert (plain["prompt_tokens"], plain["completion_tokens"], plain["cached_tokens"]) == (9, 3, 7)
    assert (plain["worker"], plain["reason"], plain["retries"]) == (a.removeprefix("http://"), "no_keys", 0)
    assert 0 < plain["ttft_ms"] <= plain["total_ms"]
    assert len(plain["trace_id"]) == 32
    assert stream["stream"]
    assert (refused["status"], refused["error"], refused["model"]) == (404, "model_not_found", "unknown")
    for secret in ("a secret of mine", "sk-not-for-you", "word0", "2026-01-01"):
        assert secret not in log.read_text()


@pytest.mark.e2e
def test_the_text_log_says_the_same_and_requests_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    with serve(FakeVLLM()) as a:
        with process(tmp_path / "with", a) as (client, log):
            client.post(CHAT, json=BODY)
        with process(tmp_path / "without", a, CAIRN_LOG_LEVEL="warning") as (client, quiet):
            assert client.post(CHAT, json=BODY).status_code == 200
    (said,) = [line for line in log.read_text().splitlines() if "gateway.logs: request" in line]
    assert f"model=fake path={CHAT} status=200" in said
    assert "client_abort=false" in said
    assert "INFO" not in quiet.read_text()
    assert "request " not in quiet.read_text()
