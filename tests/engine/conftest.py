"""Real engines: vLLM on the CPU, the bundled model, a real Valkey."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.launch.model import prepare
from tests.engine.rig import Worker

Start = Callable[..., Worker]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="session")
def model() -> Path:
    return prepare("SmolLM2-135M-Instruct", Path.home() / ".cache" / "cairn").path


@pytest.fixture(scope="session")
def tiny(model: Path) -> Path:
    """The folder of the small random model, made once."""
    made = Path.home() / ".cache" / "cairn" / "tiny-llama-v2"
    if not made.exists():
        scratch = made.with_name(f".tiny-llama-{os.getpid()}")
        script = Path(__file__).with_name("tiny.py")
        subprocess.run([sys.executable, str(script), str(model), str(scratch)], check=True)
        try:
            scratch.rename(made)
        except OSError:  # another session was quicker
            shutil.rmtree(scratch)
    return made


@pytest.fixture(scope="module")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts workers that end with the module, whatever happens."""
    logs = tmp_path_factory.mktemp("logs")
    with contextlib.ExitStack() as stack:

        def launch(name: str, *args: object, weights: Path = model, **kwargs: object) -> Worker:
            worker = Worker(weights, logs / f"{name}.log", *args, **kwargs)
            stack.callback(worker.kill)
            return worker

        yield launch


@pytest.fixture(scope="module")
def valkey_module(valkey_server):
    """The session's server, empty, for a whole module."""
    valkey_server.start()
    with valkey_server.client() as client:
        client.flushall()
    return valkey_server
