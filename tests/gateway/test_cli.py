"""`cairn` as a person runs it."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture
def cairn(tmp_path):
    """cairn(*words, **env) → the finished process; nothing of this machine's own stack is seen."""

    def run(*words: str, **env: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
        return subprocess.run(
            [sys.executable, "-m", "gateway.cli", *words],
            capture_output=True,
            text=True,
            env=clean | {"CAIRN_HOME": str(tmp_path), "CAIRN_PORT": "1", "COLUMNS": "200"} | env,
            check=False,
        )

    return run


@pytest.fixture
def gateway():
    """A gateway that knows one worker; yields its URL."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(
                {"workers": [{"id": "w1", "state": "ready", "model": "m", "namespace": ""}]}
            ).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_importing_the_command_loads_neither_torch_nor_the_web_stack():
    heavy = "{'torch', 'vllm', 'fastapi', 'transformers'}"
    code = f"import sys, gateway.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_is_nowhere_is_one_sentence_and_no_traceback(cairn):
    done = cairn("model", "prepare", "/no/such/model")
    assert done.returncode == 1
    assert done.stderr.startswith("cairn: no model directory at /no/such/model")
    assert done.stderr.count("\n") == 1


def test_an_unknown_key_in_the_file_names_the_nearest(cairn, tmp_path):
    (tmp_path / "cairn.yaml").write_text("worker_cuont: 2\n")
    done = cairn("up", "--config", str(tmp_path / "cairn.yaml"))
    assert done.returncode == 1
    assert "did you mean 'worker_count'?" in done.stderr


def test_another_processs_config_file_does_not_trouble_status(cairn, tmp_path, gateway):
    (tmp_path / "engine.yaml").write_text("chunk_tokens: 256\n")
    assert cairn("status", "--url", gateway, CAIRN_CONFIG=str(tmp_path / "engine.yaml")).returncode == 0


def test_status_without_a_gateway_says_how_to_start_one(cairn):
    done = cairn("status")
    assert done.returncode == 1
    assert "make up" in done.stderr


def test_status_of_a_gateway_is_a_table_or_json(cairn, gateway):
    assert "w1" in cairn("status", "--url", gateway).stdout
    assert json.loads(cairn("status", "--url", gateway, "--json").stdout)[0]["id"] == "w1"


def test_doctor_exits_1_when_something_cannot_work(cairn, gateway):
    done = cairn("doctor", "--url", gateway, "--json", CAIRN_REDIS_URL="redis://127.0.0.1:1/0")
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert found["redis"]["level"] == "fail"
    assert found["handshake, w1"]["level"] == "warn"
