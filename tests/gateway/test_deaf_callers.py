"""A real gateway process, and callers who ask and do not read what they are told."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.process import Gateway, started

pytestmark = pytest.mark.e2e

BODY = b'{"model":"fake","prompt":"hi","stream":true}'
ASK = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % len(BODY)


@dataclass
class Loud(FakeVLLM):
    """Says as many megabytes as it is told to, as fast as they are taken."""

    megabytes: float = 30

    async def _generate(self, ask: dict[str, Any], send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        event = b"data: " + b"x" * 9992 + b"\n\n"
        for _ in range(int(self.megabytes * 100)):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@pytest.fixture
def loud() -> Loud:
    return Loud()


@pytest.fixture
def gateway(loud: Loud, tmp_path: Path) -> Iterator[Gateway]:
    with serve(loud) as url, started(tmp_path, f"fake={url}", idle_timeout_seconds=1.0) as gateway:
        yield gateway


def deaf(gateway: Gateway, request: bytes) -> socket.socket:
    """Who asked, and takes little more than a packet."""
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.connect(("127.0.0.1", gateway.port))
    caller.sendall(request)
    return caller


def filled() -> float:
    """Megabytes that the kernel takes for who does not read."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(listener.getsockname())
        speaker, _ = listener.accept()
        taken = 0
        with speaker, contextlib.suppress(BlockingIOError):
            speaker.setblocking(False)
            while True:
                taken += speaker.send(b"x" * 10_000)
        return taken / 1e6


def sockets(gateway: Gateway) -> int:
    """Open ones, of the processes that serve."""
    found = 0
    for link in (link for pid in gateway.serving() for link in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(link).startswith("socket:")
    return found


def test_who_does_not_read_its_answer_is_cut_off_and_holds_nothing(loud: Loud, gateway: Gateway) -> None:
    with deaf(gateway, ASK + b"\r\n" + BODY):
        wait_until(lambda: loud.running == 1)
        wait_until(lambda: gateway.inflight() == 0)
        assert loud.running == 0
    assert "upstream_timeout" in gateway.log.read_text()


def test_an_answer_that_is_said_and_not_taken_is_not_kept(loud: Loud, gateway: Gateway) -> None:
    """However much of it is left to us when the kernel's buffers are full."""
    gateway.inflight()
    before = most = sockets(gateway)
    with contextlib.ExitStack() as stack:
        full = filled()
        for n in range(16):
            loud.megabytes = full + n / 100
            last = b"connection: close\r\n" if n % 2 else b""
            stack.enter_context(deaf(gateway, ASK + last + b"\r\n" + BODY))
            wait_until(lambda: len(loud.asked) > n)  # noqa: B023  it is called here and now
            most = max(most, sockets(gateway))
        assert most > before
        wait_until(lambda: sockets(gateway) <= before, 60)
        assert gateway.inflight() == 0


def test_who_reads_slowly_hears_all_of_it(loud: Loud, gateway: Gateway) -> None:
    loud.megabytes = 1
    heard = b""
    with deaf(gateway, ASK + b"connection: close\r\n\r\n" + BODY) as caller:
        caller.settimeout(30)
        while said := caller.recv(1 << 15):
            heard += said
            time.sleep(0.05)
    assert heard.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
