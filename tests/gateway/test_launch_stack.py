"""The whole sequence as a real launcher process; worker and gateway are tiny HTTP servers, Valkey is real."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.launch import state
from gateway.launch.checks import port_is_free
from gateway.launch.config import LaunchConfig
from gateway.launch.model import Model
from gateway.launch.processes import group_alive
from gateway.launch.stack import worker_specs

pytestmark = pytest.mark.e2e

LAUNCHER = '''
import os, sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from gateway.launch import worker
from gateway.launch.board import Board
from gateway.launch.config import LaunchConfig
from gateway.launch.errors import LaunchError
from gateway.launch.stack import Stack, answers

SERVER = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *words): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""

class Toy(Stack):
    def _worker_part(self, name, spec):
        part = super()._worker_part(name, spec)
        return replace(part, argv=(sys.executable, "-c", os.environ.get("TOY", SERVER), str(spec.port)))

    def _gateway_part(self, model, redis_url, urls):
        part = super()._gateway_part(model, redis_url, urls)
        return replace(part, argv=(sys.executable, "-c", SERVER, str(self.config.port)))

config = LaunchConfig.load(home=sys.argv[1], model=sys.argv[2], port=int(sys.argv[3]), worker_count=2,
                           host_bytes="1MiB", redis_bytes="64MiB", disk_bytes=0)
try:
    sys.exit(Toy(config, os.environ, Board(Console())).run(lambda model: print("GREETING", flush=True)))
except LaunchError as exc:
    print(exc.tail); print(exc.log); sys.exit(f"cairn: {exc}")
'''


def block_of_ports() -> int:
    """The first of three free neighbours, below the range that outgoing connections use."""
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_000, 10):
        if all(port_is_free(port + i) for i in range(3)):
            return port
    raise AssertionError("no three free ports")


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "toy-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 4096}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def launch(tmp_path, model):
    """launch(**env) → the launcher as a process, its output readable; killed afterwards."""
    running = []

    def start(port: int | None = None, **env: str) -> subprocess.Popen:
        home = str(tmp_path / "home")
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, home, str(model), str(port or block_of_ports())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ) | env,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def up(process: subprocess.Popen) -> list[str]:
    """Its lines until the greeting."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "GREETING" in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_comes_up_and_leaves_nobody_behind(launch, tmp_path, sign):
    process = launch()
    lines = up(process)
    assert [line.split()[1] for line in lines if line.startswith("✓")][:3] == ["preflight", "model", "valkey"]
    note = state.read(tmp_path / "home")
    assert set(note.parts) == {"valkey", "w1", "w2", "gateway"}
    process.send_signal(sign)
    assert process.wait() == 0
    assert not any(group_alive(pid) for pid in note.parts.values())
    assert state.read(tmp_path / "home") is None


def test_a_launcher_killed_outright_leaves_nobody_behind(launch, tmp_path):
    process = launch()
    up(process)
    note = state.read(tmp_path / "home")
    process.kill()
    while any(group_alive(pid) for pid in note.parts.values()):  # bounded by pytest's timeout
        time.sleep(0.05)


def test_a_worker_that_dies_at_start_ends_the_start_and_everything_else(launch, tmp_path):
    process = launch(TOY="raise SystemExit('weights are missing')")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "weights are missing" in output
    assert str(tmp_path / "home" / "logs" / "w") in output
    assert "exited with code 1" in output.splitlines()[-1]


def test_a_worker_that_dies_later_comes_back_while_the_rest_serve(launch, tmp_path):
    process = launch()
    up(process)
    note = state.read(tmp_path / "home")
    os.kill(note.parts["w2"], signal.SIGKILL)
    assert "w2 was killed by SIGKILL; starting it again in 1 s" in process.stdout.readline()
    assert "w2 is back" in process.stdout.readline()
    assert group_alive(note.parts["w1"])
    process.terminate()
    assert process.wait() == 0


def test_a_second_stack_in_the_same_home_is_refused_by_name(launch):
    first = launch()
    up(first)
    output = launch().communicate()[0]
    assert "a stack already runs from" in output
    assert f"process {first.pid}" in output


def test_a_port_in_use_is_named_with_its_owner(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = launch(port=port)
        output = process.communicate()[0]
    assert process.returncode == 1
    assert f"port {port} is in use by process {os.getpid()}" in output


def test_ports_beyond_the_last_are_refused_before_anything_starts(launch):
    process = launch(port=65535)
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "Traceback" not in output
    assert "choose a lower PORT" in output


def test_workers_get_stable_ids_their_own_ports_and_folders(tmp_path, model):
    config = LaunchConfig.load(env={}, home=tmp_path, port=9000, worker_count=2)
    specs = worker_specs(config, Model(model, "toy"), "redis://somewhere")
    assert [spec.port for spec in specs] == [9001, 9002]
    assert [spec.cache["worker_id"] for spec in specs] == ["w1", "w2"]
    assert specs[1].cache["disk_path"] == str(tmp_path / "disk" / "w2")
    assert specs[0].max_model_len == 4096  # the model's own limit is shorter than ours


def test_no_disk_means_no_disk_path(tmp_path, model):
    config = LaunchConfig.load(env={}, home=tmp_path, disk_bytes=0)
    assert "disk_path" not in worker_specs(config, Model(model, "toy"), "")[0].cache
