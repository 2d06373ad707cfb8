"""Real servers for the tests that need one.  No mocks: they can be killed, frozen and started again."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
from hypothesis import settings

from tests.servers import REDIS, Cluster, Sentinels, Server, TlsServer, needed

# `make check` draws the same examples every time, so a commit is judged by what it changed; plain pytest
# draws new ones, and `pytest --hypothesis-profile=hunt` many of them.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("hunt", max_examples=3000, deadline=None)

ValkeyServer = Server


class _Killable(Protocol):
    def start(self) -> None: ...
    def kill(self) -> None: ...


S = TypeVar("S", bound=_Killable)


@contextmanager
def _running(make: Callable[[Path], S]) -> Iterator[S]:
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    try:
        server = make(folder)
        try:
            server.start()
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Server]:
    """One Valkey for the session.  Tests take `valkey`, which is running and empty."""
    with _running(Server) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: Server) -> Server:
    """The session's Valkey: running (also after a test that killed it), thawed, and flushed."""
    valkey_server.start()
    valkey_server.flush()
    return valkey_server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    binary = needed(REDIS, "redis-server")
    with _running(lambda folder: Server(folder, binary)) as server:
        yield server


@pytest.fixture(scope="session")
def tls_server() -> Iterator[TlsServer]:
    with _running(TlsServer) as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with _running(Cluster) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def sentinels() -> Iterator[Sentinels]:
    """For tests that do not fail over."""
    with _running(Sentinels) as watched:
        yield watched


@pytest.fixture
def failing_over() -> Iterator[Sentinels]:
    """A set of one's own, to kill."""
    with _running(Sentinels) as watched:
        yield watched
