"""A real gateway process, and callers who speak HTTP badly, slowly, endlessly or in two ways at once.

The worker is a recorder of raw bytes: it heard what the gateway sent, not what a server made of that."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fakes import wait_until
from tests.gateway.process import Gateway, started

pytestmark = pytest.mark.e2e

BODY = b'{"model":"fake","prompt":"hi"}'
LENGTH = len(BODY)
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
SIZED = b"content-length: %d\r\n" % LENGTH
CHUNKED = b"transfer-encoding: chunked\r\n"
PARTS = b"%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, BODY)
PLAIN = POST + SIZED + b"\r\n" + BODY
ANOTHER = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-smuggled: 1\r\n" + SIZED + b"\r\n" + BODY
# what httpx and the gateway add to whatever was asked
OWN = {b"host", b"content-length"}


@dataclass
class Recorder:
    """A worker made of a socket: every request it hears, byte by byte; answers each with `{}`."""

    heard: list[tuple[bytes, bytes]] = field(default_factory=list)  # head, body
    rubbish: list[bytes] = field(default_factory=list)  # what was no request with a Content-Length

    def run(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hear, args=(peer,), daemon=True).start()

    def _hear(self, peer: socket.socket) -> None:
        data = b""
        with peer, contextlib.suppress(OSError):
            while True:
                head, end, rest = data.partition(b"\r\n\r\n")
                length = int(dict(fields(head)).get(b"content-length", b"0"))
                if end and len(rest) >= length:
                    data = rest[length:]
                    if head.startswith(b"POST /v1/"):
                        self.heard.append((head, rest[:length]))
                    elif not head.startswith(b"GET /"):
                        self.rubbish.append(head)
                    peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                more = peer.recv(1 << 16)
                if not more:
                    if data:
                        self.rubbish.append(data)
                    return
                data += more


def fields(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = head.split(b"\r\n")[1:]
    return [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]


@contextlib.contextmanager
def recording() -> Iterator[tuple[str, Recorder]]:
    recorder = Recorder()
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        thread = threading.Thread(target=recorder.run, args=(listener,), name="recorder")
        thread.start()
        try:
            yield f"fake=http://127.0.0.1:{listener.getsockname()[1]}", recorder
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def whole(said: bytes) -> list[tuple[int, bytes]]:
    """The answers that are complete: status and body.  One without a length ends with its connection."""
    answers = []
    while True:
        head, end, rest = said.partition(b"\r\n\r\n")
        size = int(dict(fields(head)).get(b"content-length", b"0"))
        if not end or len(rest) < size:
            return answers
        answers.append((int(head.split()[1]), rest[:size]))
        said = rest[size:]


def listen(caller: socket.socket, answers: int = 99) -> bytes:
    """Everything until the other end closes, or that many answers are whole."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while len(whole(said)) < answers and (part := caller.recv(1 << 16)):
            said += part
    return said


def say(gateway: Gateway, data: bytes, answers: int = 1) -> bytes:
    """Say it all; what was said until that many answers were whole, or the connection closed."""
    with gateway.connect() as caller:
        with contextlib.suppress(OSError):
            caller.sendall(data)
        return listen(caller, answers)


@dataclass
class House:
    gateway: Gateway
    worker: Recorder


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("hostile")
    with (
        recording() as (url, worker),
        started(folder, url, receive_timeout_seconds=60, max_body_bytes=1 << 20) as gateway,
    ):
        yield House(gateway, worker)


@pytest.fixture(autouse=True)
def forgetful(house: House) -> None:
    house.worker.heard.clear()
    house.worker.rubbish.clear()


def statuses(said: bytes) -> list[int]:
    """Of all answers; those that refuse have OpenAI's shape."""
    for status, body in whole(said):
        if status >= 400:
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
    return [status for status, _ in whole(said)]


REFUSED = {
    "both lengths": POST + b"content-length: 5\r\n" + CHUNKED + b"\r\n" + PARTS + ANOTHER,
    "both, the other way": POST + CHUNKED + b"content-length: 5\r\n\r\n" + PARTS + ANOTHER,
    "two lengths": POST + SIZED + b"content-length: 3\r\n\r\n" + BODY + ANOTHER,
    "a length twice": POST + SIZED + SIZED + b"\r\n" + BODY,
    "a list of lengths": POST + b"content-length: %d, %d\r\n\r\n" % (LENGTH, LENGTH) + BODY,
    "a signed length": POST + b"content-length: +%d\r\n\r\n" % LENGTH + BODY,
    "a length in hex": POST + b"content-length: 0x1e\r\n\r\n" + BODY,
    "a length beyond 64 bits": POST + b"content-length: " + b"9" * 30 + b"\r\n\r\n" + BODY,
    "xchunked": POST + b"transfer-encoding: xchunked\r\n\r\n" + PARTS + ANOTHER,
    "chunked and more": POST + b"transfer-encoding: chunked, identity\r\n\r\n" + PARTS,
    "identity": POST + b"transfer-encoding: identity\r\n" + SIZED + b"\r\n" + BODY,
    "a tab in chunked": POST + b"transfer-encoding:\x0bchunked\r\n" + SIZED + b"\r\n" + BODY,
    "a space before the colon": POST + b"transfer-encoding : chunked\r\n" + SIZED + b"\r\n" + BODY,
    "a folded header": POST + b"x-a: b\r\n transfer-encoding: chunked\r\n" + SIZED + b"\r\n" + BODY,
    "line feeds alone": (POST + SIZED).replace(b"\r\n", b"\n") + b"\n" + BODY,
    "a NUL": POST + b"x-a: a\x00b\r\n" + SIZED + b"\r\n" + BODY,
    "a bare CR": POST + b"x-a: a\rx-b: c\r\n" + SIZED + b"\r\n" + BODY,
    "a space in a name": POST + b"x api key: 1\r\n" + SIZED + b"\r\n" + BODY,
    "no name": POST + b": 1\r\n" + SIZED + b"\r\n" + BODY,
    "a negative chunk": POST + CHUNKED + b"\r\n-1\r\n" + BODY,
    "a huge chunk": POST + CHUNKED + b"\r\nffffffffffffffffff\r\n" + BODY,
    "chunks by line feeds": POST + CHUNKED + b"\r\n%x\n%b\n0\n\n" % (LENGTH, BODY),
    "a line feed in a chunk's extension": POST + CHUNKED + b"\r\n%x;a\nb\r\n%b\r\n0\r\n\r\n" % (LENGTH, BODY),
    "no path": b"POST http://evil HTTP/1.1\r\nhost: x\r\n" + SIZED + b"\r\n" + BODY,
    "a tunnel": b"CONNECT evil:80 HTTP/1.1\r\nhost: x\r\n\r\n" + ANOTHER,
    "a tunnel that upgrades": b"CONNECT evil:80 HTTP/1.1\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    + ANOTHER,
    "bytes above ASCII in the path": b"POST /v1/\xc3\xa9 HTTP/1.1\r\nhost: x\r\n" + SIZED + b"\r\n" + BODY,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.7": POST.replace(b"1.1", b"3.7") + SIZED + b"\r\n" + BODY,
    "TLS": bytes.fromhex("16030100c2010000be0303") + b"\x00" * 60,
    "noise": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_read_in_two_ways_is_not_read_at_all(house: House, name: str) -> None:
    said = say(house.gateway, REFUSED[name])
    assert statuses(said) in ([400], [404])
    assert house.gateway.inflight() == 0
    assert (house.worker.heard, house.worker.rubbish) == ([], [])


SERVED = {
    "an absolute target": b"POST http://evil/v1/completions HTTP/1.1\r\nhost: x\r\n" + SIZED,
    "no host": b"POST /v1/completions HTTP/1.1\r\n" + SIZED,
    "two hosts": POST + b"host: y\r\n" + SIZED,
    "HTTP/1.0": POST.replace(b"1.1", b"1.0") + SIZED,
    "underscores": POST + b"content_length: 5\r\ntransfer_encoding: chunked\r\nx_a: 1\r\n" + SIZED,
    "headers of the hop": POST + b"connection: close, x-a\r\nkeep-alive: 9\r\nte: trailers\r\ntrailer: x\r\n"
    b"proxy-authorization: s\r\nproxy-connection: close\r\nx-a: 1\r\n" + SIZED,
    "a switch of ours": POST + b"x-cairn-explain: 1\r\n" + SIZED,
    "an offer to upgrade": POST + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n" + SIZED,
    "chunks": POST + CHUNKED,
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_one_request_is_one_request_with_the_headers_we_mean_to_send(house: House, name: str) -> None:
    head = SERVED[name] + b"x-kept: \xe9\r\n\r\n"
    said = say(house.gateway, head + (PARTS if name == "chunks" else BODY))
    assert statuses(said) == [200]
    ((head, body),) = house.worker.heard
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert body == BODY
    assert {key for key, _ in fields(head)} - OWN == {b"x-kept", b"x-request-id"}
    assert len(fields(head)) == 4
    assert house.worker.rubbish == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter", "/v1/%6coad_lora_adapter", "/v1/x/../load_lora_adapter",
        "/v1/load_lora_adapter/", "/v1/./load_lora_adapter", "/v1//load_lora_adapter",
        "/v1/x%2f..%2fload_lora_adapter", "/v1/..%5csleep", "/v1/%2e%2e/sleep", "/v1/..;/sleep", "/sleep",
        "/reset_prefix_cache", "/collective_rpc", "/v1/x%0d%0ax-b: 1",
        "/v1/x%20HTTP/1.1%0d%0a%0d%0aPOST%20/sleep", "/v1/x%00", "/v1/x?y", "/v1/x%3fy", "/v1/x%23y",
        "/v1/\\x", "/v1/%c3%a9", "/v1/%ff", "*", "x", "/v1/" + "x/" * 3000, "/v1/" + "x" * 6000,
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_reaches_what_is_not_relayed(house: House, path: str) -> None:
    said = say(house.gateway, PLAIN.replace(b"/v1/completions", path.encode()))
    heard = [head.split(b" ")[1] for head, _ in house.worker.heard]
    assert statuses(said)[0] in (400, 404) or (path == "/v1/x?y" and heard == [b"/v1/x"])
    assert heard in ([], [b"/v1/x"])
    assert house.worker.rubbish == []


def test_nobody_is_sent_elsewhere_by_the_host_they_name(house: House) -> None:
    said = say(
        house.gateway, PLAIN.replace(b"completions", b"completions/").replace(b"host: x", b"host: evil")
    )
    assert statuses(said) == [404]
    assert b"evil" not in said


def test_pipelined_requests_are_as_many_as_were_sent(house: House) -> None:
    assert statuses(say(house.gateway, PLAIN * 3, answers=3)) == [200] * 3
    assert len(house.worker.heard) == 3


def test_half_a_request_is_none(house: House) -> None:
    with house.gateway.connect() as caller:
        caller.sendall(PLAIN[:-1])
    wait_until(lambda: house.gateway.inflight() == 0)
    assert house.worker.heard == []


def test_rubbish_behind_a_request_never_speaks_inside_its_answer(house: House) -> None:
    said = say(house.gateway, PLAIN + b"\x00\x00" + ANOTHER)
    assert said.count(b"HTTP/1.1 2") + said.count(b"HTTP/1.1 4") <= 1
    assert not any(b"x-smuggled" in head for head, _ in house.worker.heard)


@pytest.mark.parametrize(
    "head",
    [
        POST + b"x-a: " + b"a" * (80 << 10) + b"\r\n\r\n",
        POST + b"x-a: b\r\n" * 10_000 + b"\r\n",
        b"POST /?%b HTTP/1.1\r\nx-a: %b\r\n\r\n" % (b"a" * (60 << 10), b"a" * (8 << 10)),
    ],
    ids=["one header", "many headers", "the target too"],
)
def test_a_head_over_64_kilobytes_is_a_431(house: House, head: bytes) -> None:
    assert statuses(say(house.gateway, head)) == [431]
    assert house.worker.heard == []


def test_a_head_without_an_end_is_cut_and_costs_no_memory(house: House) -> None:
    before = house.gateway.rss()
    with house.gateway.connect() as caller:
        caller.sendall(POST + b"x-a: ")
        with contextlib.suppress(OSError):
            for _ in range(800):
                caller.sendall(b"a" * (1 << 17))  # 100 MB
        with contextlib.suppress(OSError):
            listen(caller)
    assert house.gateway.rss() - before < 32 << 20


@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
def test_a_hundred_megabytes_are_a_413_and_cost_no_memory(house: House, chunked: bool) -> None:
    before = house.gateway.rss()
    part = b"x" * (1 << 20)
    with house.gateway.connect() as caller:
        caller.sendall(POST + (CHUNKED if chunked else b"content-length: %d\r\n" % (100 << 20)) + b"\r\n")
        for _ in range(100):
            caller.sendall(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        assert statuses(listen(caller, 1)) == [413]
    assert house.gateway.rss() - before < 32 << 20
    assert house.worker.heard == []
    assert house.gateway.inflight() == 0


def test_a_form_of_very_many_parts_is_a_400(house: House) -> None:
    """Half a million would keep the loop busy for twenty seconds."""
    part = b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n"
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=x\r\n"
    for parts, expected in ((1900, 200), (10_000, 400)):
        body = part * parts + b"--x--\r\n"
        said = say(house.gateway, head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert statuses(said) == [expected]


# -- slowly


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[House]:
    """A gateway that waits one second for a request, and keeps 200 connections."""
    with (
        recording() as (url, worker),
        started(
            tmp_path, url, receive_timeout_seconds=1, max_inflight=100, max_body_bytes=1 << 20
        ) as gateway,
    ):
        yield House(gateway, worker)


def trickle(callers: list[socket.socket], drop: Callable[[int], bytes]) -> list[bytes]:
    """A byte now and then to each, until every one is hung up on; what each was told."""
    told: dict[socket.socket, bytes] = {}
    for caller in callers:
        caller.setblocking(False)
    until = time.monotonic() + 60
    turn = 0
    while len(told) < len(callers):
        assert time.monotonic() < until, "nobody hung up"
        for caller in callers:
            if caller in told:
                continue
            try:
                caller.send(drop(turn))
                if not (said := caller.recv(1 << 16)):
                    told[caller] = b""
                else:
                    told[caller] = said
            except BlockingIOError:
                pass
            except OSError:
                told[caller] = b""
        turn += 1
        time.sleep(0.05)
    return [told[caller] for caller in callers]


@pytest.mark.parametrize(
    ("opening", "drop"),
    [
        (POST + b"x-a: ", b"a"),
        (POST + SIZED + b"\r\n", BODY[:1]),
        (POST + CHUNKED + b"\r\n", b"1\r\n \r\n"),
        (b"", b"P"),
    ],
    ids=["heads", "bodies", "chunks", "methods"],
)
def test_slow_callers_are_hung_up_on_and_the_others_are_served(
    hasty: House, opening: bytes, drop: bytes
) -> None:
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(hasty.gateway.connect()) for _ in range(80)]
        for caller in callers:
            caller.sendall(opening)
        assert statuses(say(hasty.gateway, PLAIN)) == [200]
        answers = trickle(callers, lambda turn: drop)
    assert {status for said in answers for status in statuses(said)} <= {408, 400}
    assert any(statuses(said) == [408] for said in answers) or drop == b"P"
    wait_until(lambda: hasty.gateway.inflight() == 0)
    assert len(hasty.worker.heard) == 1


def test_silent_callers_and_those_who_send_only_empty_lines_are_hung_up_on(hasty: House) -> None:
    with hasty.gateway.connect() as silent:
        assert listen(silent) == b""
    with hasty.gateway.connect() as polite:
        polite.sendall(PLAIN)
        assert polite.recv(1 << 16).startswith(b"HTTP/1.1 200")
        trickle([polite], lambda turn: b"\r\n")


def test_a_body_that_goes_on_after_its_413_is_not_heard_for_ever(hasty: House) -> None:
    with hasty.gateway.connect() as caller:
        caller.sendall(POST + CHUNKED + b"\r\n")
        part = b"%x\r\n%b\r\n" % (1 << 16, b"x" * (1 << 16))

        def cut() -> bool:
            try:
                caller.sendall(part)
            except OSError:
                return True
            return False

        wait_until(cut, 60)


def test_a_large_body_may_take_longer(hasty: House) -> None:
    """64 KiB in three seconds where one second is the patience: faster than 16 KiB/s."""
    body = BODY[:-1] + b" " * ((64 << 10) - LENGTH) + b"}"
    with hasty.gateway.connect() as caller:
        caller.sendall(POST + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
        for at in range(0, len(body), len(body) // 4):
            caller.sendall(body[at : at + len(body) // 4])
            time.sleep(0.75)
        assert statuses(listen(caller)) == [200]


def test_callers_beyond_the_bound_are_told_to_come_back(hasty: House) -> None:
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(hasty.gateway.connect()) for _ in range(220)]
        for caller in callers[200:]:
            caller.sendall(PLAIN)
        told = [listen(caller, 1) for caller in callers[200:]]
        assert b"retry-after: 1" in told[0]
        assert [statuses(said) for said in told] == [[503]] * 20
        assert all(listen(caller) == b"" for caller in callers[:200])  # who said nothing is told nothing
    assert statuses(say(hasty.gateway, PLAIN)) == [200]


def test_beyond_twice_the_bound_nobody_is_heard(hasty: House) -> None:
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(hasty.gateway.connect()) for _ in range(402)]
        with contextlib.suppress(OSError):
            callers[-1].sendall(PLAIN)
        assert listen(callers[-1]) == b""
