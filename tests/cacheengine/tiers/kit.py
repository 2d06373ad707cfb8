"""What the tier tests share: aligned memory, chunks with known bytes, a server that says what it is told."""

import mmap
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cacheengine.keys import ChunkKey, Namespace, digest
from cacheengine.tier import Ref
from cacheengine.tiers.disk import DiskTier
from cacheengine.tiers.redis import RedisTier

NAMESPACE = Namespace(digest(b"tests"))
TOKENS = 256
PAYLOAD = 3 * 4096 + 100  # ragged on purpose
SLOTS = 8
CAPACITY = 2 * 4096 + SLOTS * (5 * 4096 + 128)  # superblock, first page of the header copies; slots, records


def buffer(size: int = PAYLOAD, fill: bytes = b"") -> memoryview:
    """Page-aligned memory, as the arena gives it."""
    view = memoryview(mmap.mmap(-1, size))
    view[: len(fill)] = fill
    return view


def ref(n: int) -> Ref:
    """Chunk n of one prompt, in slot n."""
    return Ref(key(n), n, key(n - 1) if n else b"", key(0))


def key(n: int) -> ChunkKey:
    return ChunkKey(digest(b"chunk", n.to_bytes(4, "little")))


def payload(n: int, size: int = PAYLOAD) -> memoryview:
    return buffer(size, random.Random(n).randbytes(size))


def chunks(n: int) -> tuple[list[Ref], list[memoryview]]:
    return [ref(i) for i in range(n)], [payload(i) for i in range(n)]


def blank(n: int) -> list[memoryview]:
    return [buffer() for _ in range(n)]


def disk_tier(
    path: Path,
    capacity: int = CAPACITY,
    namespace: Namespace = NAMESPACE,
    payload_bytes: int = PAYLOAD,
    codec: str = "raw",
) -> DiskTier:
    return DiskTier([path], capacity, payload_bytes, namespace, TOKENS, 0, 1, codec)


def redis_tier(
    url: str,
    model: str = "org/model",
    payload_bytes: int = PAYLOAD,
    timeout_ms: int = 5000,
    connections: int = 2,
    codec: str = "raw",
) -> RedisTier:
    return RedisTier(
        url,
        model,
        NAMESPACE,
        payload_bytes,
        TOKENS,
        "float32",
        "test",
        0,
        1,
        "w0",
        60,
        timeout_ms,
        connections,
        codec,
    )


class ScriptedServer:
    """A socket that answers connection i with script i, and remembers what it was sent.

    A script is bytes, sent as soon as anything arrives; then the connection is kept open, or closed if the
    script ends in `hangup`.
    """

    hangup = b"<hangup>"

    def __init__(self, scripts: Sequence[bytes]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self.received: list[bytes] = []
        self._scripts = scripts
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for script in self._scripts:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            self.received.append(peer.recv(1 << 20))
            peer.sendall(script.removesuffix(self.hangup))
            if script.endswith(self.hangup):
                peer.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._thread.join()
        for peer in self._open:
            peer.close()


def unlink(tier: RedisTier, refs: Sequence[Ref]) -> None:
    """As a reader deletes what is damaged."""
    with tier._session(0) as session:
        tier._forget(session, refs)


@contextmanager
def scripted(*scripts: bytes) -> Iterator[ScriptedServer]:
    server = ScriptedServer(scripts)
    try:
        yield server
    finally:
        server.close()
