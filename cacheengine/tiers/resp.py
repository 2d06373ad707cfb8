"""One raw RESP2 connection: large values go out with sendmsg and come in with recv_into.

redis-py copies and splits megabyte values; this does neither.  It is thread-confined and knows no commands
but AUTH and SELECT.  Its promise is about the stream: after a call returns, the next reply read belongs to
the next unanswered command.  When that cannot be promised (timeout, short read, garbage) the connection
closes itself and raises TierDown; there is no way to read on.
"""

import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cacheengine.errors import TierDown
from cacheengine.redis_url import Address

_BUFFER_BYTES = 16 << 10  # of replies read ahead; payload that lands here is copied twice: keep it small
_SCRATCH_BYTES = 256 << 10  # for replies nobody wants
_MAX_BULK = 512 << 20  # Redis' own proto-max-bulk-len
_MAX_SMALL = 1 << 20  # of what reply() returns as one object
_MAX_ITEMS = 1 << 16
_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """`-CODE text`: the server refused one command.  The stream is still in step, so this is a value."""

    text: str

    @property
    def code(self) -> str:
        return self.text.split(" ", 1)[0]


Reply = int | bytes | ErrorReply | list["Reply"] | None
# An argument given as several buffers is their concatenation, never copied together.
Command = Sequence[bytes | Sequence[bytes | memoryview]]


def _encode(commands: Sequence[Command]) -> list[bytes | memoryview]:
    """The wire form as few buffers: small pieces joined, memoryviews as they are."""
    buffers: list[bytes | memoryview] = []
    text = bytearray()
    for command in commands:
        text += b"*%d\r\n" % len(command)
        for argument in command:
            parts = (argument,) if isinstance(argument, bytes) else argument
            text += b"$%d\r\n" % sum(map(len, parts))
            for part in parts:
                if isinstance(part, memoryview):
                    buffers += (bytes(text), part)
                    text.clear()
                else:
                    text += part
            text += b"\r\n"
    return [*buffers, bytes(text)]


class Connection:
    """Connected, authenticated, on the right database.  Raises TierDown from every method.

    `deadline` (time.monotonic seconds) bounds whatever happens next; the owner moves it before each batch.
    """

    def __init__(self, address: Address, timeout: float) -> None:
        self._address = address
        self.deadline = time.monotonic() + timeout
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # what is read but not consumed
        self._socket: socket.socket | None = None
        try:
            self._socket = self._connect()
            self._login()
        except OSError as exc:
            raise self._down(exc.strerror or str(exc)) from exc

    @property
    def stale(self) -> bool:
        """The server hung up, or sent what nobody asked for, while this connection lay idle."""
        if self._socket is None or self._start != self._end:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(0):
            return False
        return not (isinstance(self._socket, ssl.SSLSocket) and _only_records(self._socket))

    @property
    def closed(self) -> bool:
        return self._socket is None

    def send(self, *commands: Command) -> None:
        """Send commands in one go.  Large arguments are sent from where they lie."""
        self._send_all([memoryview(part) for part in _encode(commands)])

    def reply(self) -> Reply:
        """The next reply, whole.  For small ones; see bulk_length() and receive_into() for the others."""
        return self._reply(_MAX_DEPTH)

    def bulk_length(self) -> int | ErrorReply | None:
        """The head of a bulk reply: its length, None for nil, or the error in its place.  A length must be
        followed by receive_into()/skip() of exactly that many bytes, then end_bulk()."""
        kind, rest = self._line()
        if kind == b"-":
            return ErrorReply(rest.decode("utf-8", "replace"))
        if kind != b"$":
            raise self._down(f"a bulk reply expected, got {kind!r}")
        return self._length(rest, _MAX_BULK)

    def receive_into(self, view: memoryview, seen: Callable[[memoryview], object] | None = None) -> None:
        """Fill `view`: what was read ahead is copied, the rest comes straight from the kernel.

        `seen` is called with each piece that arrived, in order, while the server sends the next.
        """
        ahead = min(len(view), self._end - self._start)
        view[:ahead] = self._view[self._start : self._start + ahead]
        self._start += ahead
        if seen:
            seen(view[:ahead])
        while ahead < len(view):
            count = self._recv_into(view[ahead:])
            if seen:
                seen(view[ahead : ahead + count])
            ahead += count

    def skip(self, length: int) -> None:
        """Read `length` bytes and forget them."""
        scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
        while length:
            part = scratch[:length]
            self.receive_into(part)
            length -= len(part)

    def end_bulk(self) -> None:
        """The CRLF after a bulk's bytes."""
        if self._take(2) != b"\r\n":
            raise self._down("bulk reply without its end")

    def close(self) -> None:
        """Hang up.  Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._start = self._end = 0  # what was read ahead is not to be trusted either

    def _connect(self) -> socket.socket:
        address = self._address
        if isinstance(address.target, tuple):
            sock = socket.create_connection(address.target, timeout=self._remaining())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return self._encrypted(sock, address.target[0]) if address.tls else sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._remaining())
            sock.connect(address.target)
        except BaseException:
            sock.close()
            raise
        return sock

    def _encrypted(self, sock: socket.socket, host: str) -> ssl.SSLSocket:
        assert self._address.tls is not None
        try:
            sock.settimeout(self._remaining())
            return self._address.tls.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise

    def _login(self) -> None:
        commands: list[list[bytes]] = []
        if self._address.password:
            user = [self._address.user.encode()] if self._address.user else []
            commands.append([b"AUTH", *user, self._address.password.encode()])
        if self._address.db:
            commands.append([b"SELECT", b"%d" % self._address.db])
        for command in commands:
            self.send(command)
            if isinstance(answer := self.reply(), ErrorReply):
                raise self._down(f"{command[0].decode()} refused: {answer.code}")

    def _reply(self, depth: int) -> Reply:
        kind, rest = self._line()
        match kind:
            case b"+":
                return rest
            case b"-":
                return ErrorReply(rest.decode("utf-8", "replace"))
            case b":":
                return self._int(rest)
            case b"$":
                length = self._length(rest, _MAX_SMALL)
                if length is None:
                    return None
                body = bytearray(length)
                self.receive_into(memoryview(body))
                self.end_bulk()
                return bytes(body)
            case b"*" if depth:
                items = self._length(rest, _MAX_ITEMS)
                return None if items is None else [self._reply(depth - 1) for _ in range(items)]
        raise self._down(f"not RESP2: a line starting with {kind!r}")

    def _int(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError as exc:
            raise self._down("not RESP2: a number expected") from exc

    def _length(self, text: bytes, limit: int) -> int | None:
        length = self._int(text)
        if not -1 <= length <= limit:
            raise self._down(f"a reply of length {length}")
        return None if length < 0 else length

    def _line(self) -> tuple[bytes, bytes]:
        """The next line as (type byte, rest), without its CRLF."""
        searched = self._start
        while (at := self._buffer.find(b"\r\n", searched, self._end)) < 0:
            searched = max(self._start, self._end - 1)
            moved = self._fill()
            searched -= moved
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line[:1], line[1:]

    def _take(self, count: int) -> bytes:
        while self._end - self._start < count:
            self._fill()
        taken = bytes(self._view[self._start : self._start + count])
        self._start += count
        return taken

    def _fill(self) -> int:
        """Read more ahead; return by how much the unread bytes moved towards the front."""
        moved = self._start
        if moved:
            self._view[: self._end - moved] = bytes(self._view[moved : self._end])
            self._start, self._end = 0, self._end - moved
        if self._end == _BUFFER_BYTES:
            raise self._down("a reply line without an end")
        self._end += self._recv_into(self._view[self._end :])
        return moved

    def _recv_into(self, view: memoryview) -> int:
        try:
            count = self._ready().recv_into(view)
        except OSError as exc:
            raise self._down(exc.strerror or str(exc)) from exc
        if not count:
            raise self._down("the server hung up")
        return count

    def _send_all(self, buffers: list[memoryview]) -> None:
        first = 0
        while first < len(buffers):
            sock = self._ready()
            try:
                if isinstance(sock, ssl.SSLSocket):  # has no sendmsg, and copies into its records anyway
                    sent = sock.send(buffers[first])
                else:
                    sent = sock.sendmsg(buffers[first:])
            except OSError as exc:
                raise self._down(exc.strerror or str(exc)) from exc
            while first < len(buffers) and sent >= len(buffers[first]):
                sent -= len(buffers[first])
                first += 1
            if sent:
                buffers[first] = buffers[first][sent:]

    def _ready(self) -> socket.socket:
        if self._socket is None:
            raise TierDown(f"redis {self._address.where}: connection is closed")
        self._socket.settimeout(self._remaining())
        return self._socket

    def _remaining(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._down("timed out")
        return left

    def _down(self, why: str) -> TierDown:
        self.close()
        return TierDown(f"redis {self._address.where}: {why}")


def _only_records(sock: ssl.SSLSocket) -> bool:
    """Whether what makes an idle TLS socket readable is TLS's own (a session ticket), no reply and no end."""
    sock.settimeout(0)
    try:
        sock.recv(1)
    except ssl.SSLWantReadError:
        return True
    except OSError:
        return False
    return False
