"""The raw RESP2 connection: exact bytes out, exact replies in, and no reading on after a doubt."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cacheengine.errors import TierDown
from cacheengine.redis_url import parse
from cacheengine.tiers.resp import Connection, ErrorReply
from tests.cacheengine.tiers.kit import buffer, payload, scripted


@contextmanager
def answered(script: bytes, timeout: float = 5) -> Iterator[Connection]:
    """A connection that has asked one thing and is about to read `script`."""
    with scripted(script) as server:
        conn = Connection(parse(server.url).login, timeout)
        conn.send((b"PING",))
        yield conn
        conn.close()


@pytest.mark.parametrize(
    ("script", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-12\r\n", -12),
        (b"$-1\r\n", None),
        (b"$0\r\n\r\n", b""),
        (b"$4\r\na\r\nb\r\n", b"a\r\nb"),
        (b"$40000\r\n" + b"x" * 40_000 + b"\r\n", b"x" * 40_000),
        (b"*-1\r\n", None),
        (b"*0\r\n", []),
        (b"*3\r\n:1\r\n*1\r\n$1\r\na\r\n-ERR no\r\n", [1, [b"a"], ErrorReply("ERR no")]),
        (b"-OOM too much\r\n", ErrorReply("OOM too much")),
    ],
)
def test_every_kind_of_reply_is_understood(script: bytes, reply: Any):
    with answered(script + b"+next\r\n") as conn:
        assert conn.reply() == reply
        assert conn.reply() == b"next"


def test_an_error_reply_has_a_code():
    assert ErrorReply("OOM command not allowed").code == "OOM"


@pytest.mark.parametrize(
    "script",
    [
        b"?\r\n", b"\r\n", b":x\r\n", b"$-2\r\n", b"$1\r\nab\r\n", b"$99999999999\r\n", b"*99999999\r\n",
        b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n", b"x" * 20_000,
    ],
)  # fmt: skip
def test_garbage_closes_the_connection(script: bytes):
    with answered(script) as conn:
        with pytest.raises(TierDown):
            conn.reply()
        assert conn.stale
        with pytest.raises(TierDown, match="connection is closed"):
            conn.reply()


def test_replies_split_at_every_byte_are_still_understood():
    stream = b"+OK\r\n$5\r\nhel\r\n\r\n:7\r\n*1\r\n$-1\r\n" * 3
    listener = socket.create_server(("127.0.0.1", 0))
    conn = Connection(parse(f"redis://127.0.0.1:{listener.getsockname()[1]}").login, 30)
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trickle = threading.Thread(target=lambda: [peer.sendall(stream[i : i + 1]) for i in range(len(stream))])
    trickle.start()
    assert [conn.reply() for _ in range(12)] == [b"OK", b"hel\r\n", 7, [None]] * 3
    trickle.join()
    for s in (conn, peer, listener):
        s.close()


def test_a_large_value_lands_in_the_callers_memory(valkey: Any):
    size = 5 << 20
    conn = Connection(parse(valkey.url).login, 30)
    sent, got = payload(0, size), buffer(size)
    conn.send((b"SET", b"k", (b"head", sent)), (b"GET", b"k"), (b"ECHO", b"after"))
    assert conn.reply() == b"OK"
    assert conn.bulk_length() == size + 4
    head = buffer(4)
    conn.receive_into(head)
    conn.receive_into(got)
    conn.end_bulk()
    assert conn.reply() == b"after"
    assert (bytes(head), got) == (b"head", sent)
    conn.close()


def test_skipping_leaves_the_stream_in_step(valkey: Any):
    size = 1 << 20
    conn = Connection(parse(valkey.unix_url).login, 30)
    conn.send((b"SET", b"k", (payload(0, size),)), (b"GET", b"k"), (b"ECHO", b"after"))
    assert conn.reply() == b"OK"
    conn.skip(conn.bulk_length() or 0)
    conn.end_bulk()
    assert conn.reply() == b"after"
    assert not conn.stale
    conn.close()


def test_the_deadline_is_for_the_batch_not_for_each_read():
    listener = socket.create_server(("127.0.0.1", 0))
    conn = Connection(parse(f"redis://127.0.0.1:{listener.getsockname()[1]}").login, 0.3)
    peer, _ = listener.accept()
    stop = threading.Event()

    def drip() -> None:
        peer.sendall(b"$1000000\r\n")
        while not stop.wait(0.01):
            peer.sendall(b"x")  # always in time for a naive per-read timeout

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(TierDown, match="timed out"):
        conn.reply()
    stop.set()
    dripping.join()
    for s in (peer, listener):
        s.close()


def test_a_deadline_in_the_past_does_not_even_send(valkey: Any):
    conn = Connection(parse(valkey.url).login, 5)
    conn.deadline = time.monotonic()
    with pytest.raises(TierDown, match="timed out"):
        conn.send((b"PING",))


def test_an_idle_connection_notices_that_the_server_left(valkey: Any):
    conn = Connection(parse(valkey.unix_url).login, 5)
    assert not conn.stale
    valkey.kill()
    assert conn.stale
    conn.close()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "unix:///nowhere/s"])
def test_nobody_there_is_tier_down(url: str):
    with pytest.raises(TierDown, match=r"redis (127.0.0.1:1|/nowhere/s): "):
        Connection(parse(url).login, 5)


def test_a_database_that_does_not_exist_is_tier_down(valkey: Any):
    with pytest.raises(TierDown, match="SELECT refused"):
        Connection(parse(f"redis://127.0.0.1:{valkey.port}/99999").login, 5)
