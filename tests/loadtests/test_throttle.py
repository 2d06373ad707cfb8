"""The slow wire passes every byte, in order, both ways, and no more of them than it should."""

import socket
import threading
import time

import pytest

from loadtests.throttle import UNLIMITED, Throttle


@pytest.fixture
def echo():
    """An echo server; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    while data := peer.recv(1 << 16):
                        peer.sendall(data)

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def through(sock: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    got = bytearray()
    while len(got) < len(data):
        got += sock.recv(1 << 16)
    sender.join()
    return bytes(got)


def connected(wire: Throttle) -> socket.socket:
    return socket.create_connection(("127.0.0.1", wire.port), timeout=20)


def test_every_byte_arrives_in_order(echo):
    data = bytes(range(256)) * 10_000
    with Throttle(echo) as wire, connected(wire) as sock:
        assert through(sock, data) == data
        assert wire.passed == [len(data), len(data)]


def test_it_is_never_faster_than_its_rate(echo):
    with Throttle(echo, 1e6) as wire, connected(wire) as sock:
        start = time.monotonic()
        through(sock, bytes(200_000))
        assert time.monotonic() - start >= 0.19  # a bound from below holds on any machine


def test_the_rate_may_change_while_connected(echo):
    with Throttle(echo, 1e3) as wire, connected(wire) as sock:
        assert through(sock, b"a") == b"a"
        wire.rate = UNLIMITED
        assert through(sock, bytes(1_000_000)) == bytes(1_000_000)


def test_a_target_that_is_gone_is_a_hang_up_and_closing_hangs_up_too(echo):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = probe.getsockname()
    with Throttle(gone) as wire, connected(wire) as sock:
        assert hung_up(sock)
    with Throttle(echo) as wire:
        sock = connected(wire)
        assert through(sock, b"x") == b"x"
    with sock:
        assert hung_up(sock)


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
