"""Multipart bodies on their way through: the model is found, the rest is streamed."""

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.errors import BadRequest
from gateway.upload import AHEAD_BYTES, Part, Upload
from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.test_app import metric, quiet
from tests.gateway.test_endpoints import AUDIO, Scribe, gateway
from tests.gateway.test_patience import held

pytestmark = pytest.mark.e2e

BOUNDARY = "cut-here"
KIND = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
MIB = 1 << 20


def part(name: str, data: bytes, more: str = "") -> bytes:
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def sound(data: bytes) -> bytes:
    return part("file", data, '; filename="a.wav"')


END = f"--{BOUNDARY}--\r\n".encode()


@pytest.mark.parametrize("order", ["model-first", "file-first"])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_the_model_is_found_wherever_it_stands(order: str, chunked: bool) -> None:
    one, two = Scribe(), Scribe()
    parts = [part("model", b"two"), sound(os.urandom(300_000))]
    body = b"".join(parts if order == "model-first" else parts[::-1]) + END
    with serve(one) as a, serve(two) as b, gateway(f"one={a}", f"two={b}") as client:
        content: Any = iter([body[:7], body[7:70_000], body[70_000:]]) if chunked else body
        assert client.post(AUDIO, content=content, headers=KIND).json() == {"ok": True}
    assert one.heard == []
    assert two.heard == [(AUDIO, body)]
    assert (b"content-length" in two.headers[0]) is not chunked


def test_an_alias_is_replaced_inside_its_part() -> None:
    scribe = Scribe()
    with serve(scribe) as url, gateway(f"large-model={url}", aliases=["w=large-model"]) as client:
        body = part("prompt", b"w") + part("model", b"w") + sound(b"w\r\n--cut") + END
        assert client.post(AUDIO, content=body, headers=KIND).status_code == 200
    assert scribe.heard[0][1] == body.replace(part("model", b"w"), part("model", b"large-model"))


def test_a_model_far_behind_the_file_is_a_400_that_says_what_to_do() -> None:
    with (
        serve(Scribe()) as a,
        serve(Scribe()) as b,
        gateway(f"one={a}", f"two={b}", max_body_bytes=MIB) as client,
    ):
        body = sound(bytes(2 * MIB)) + part("model", b"one") + END
        reply = client.post(AUDIO, content=body, headers=KIND)
    assert reply.status_code == 400
    assert "before the file" in reply.json()["error"]["message"]


def test_a_second_model_ends_the_upload_before_the_worker_has_it() -> None:
    scribe = Scribe({"id": "base"}, {"id": "tuned", "parent": "base"})
    with serve(scribe) as url, gateway(f"base={url}") as client:
        body = part("model", b"base") + sound(bytes(MIB)) + part("model", b"tuned") + END
        reply = client.post(AUDIO, content=body, headers=KIND)
    assert reply.status_code == 400
    assert "once" in reply.json()["error"]["message"]
    assert scribe.heard == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        (KIND["content-type"], b"no boundary at all"),
        (KIND["content-type"] + "; charset=utf-16", END),
        (KIND["content-type"], part("model", b"x" * 2000) + END),
    ],
)
def test_what_is_no_form_is_a_400(kind: str, body: bytes) -> None:
    scribe = Scribe()
    with serve(scribe) as url, gateway(f"fake={url}") as client:
        reply = client.post(AUDIO, content=body, headers={"content-type": kind})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert scribe.heard == []


def test_a_hundred_megabytes_pass_in_flat_memory() -> None:
    """Gateway and worker are threads of this process: its peak is theirs."""
    scribe = Scribe(keep=False)
    chunk = bytes(64 << 10)

    def body() -> Iterator[bytes]:
        yield part("model", b"fake") + sound(b"")[:-2]
        for _ in range(1600):
            yield chunk
        yield b"\r\n" + END

    with serve(scribe) as url, gateway(f"fake={url}") as client:
        client.post(AUDIO, content=part("model", b"fake") + sound(chunk) + END, headers=KIND)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert client.post(AUDIO, content=body(), headers=KIND).status_code == 200
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert scribe.digests[-1][0] > 100 * MIB
    assert grown < 24 << 10  # KiB


def test_a_client_that_leaves_in_mid_upload_leaves_nothing_behind() -> None:
    scribe = Scribe()
    with serve(scribe) as url, gateway(f"fake={url}") as client:

        def body() -> Iterator[bytes]:
            yield part("model", b"fake") + sound(bytes(MIB))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            httpx.post(f"{client.base_url}{AUDIO}", content=body(), headers=KIND)
        wait_until(lambda: client.get("/admin/workers").json()["inflight"] == 0)
    assert scribe.heard == []


def test_who_hangs_up_while_its_upload_waits_leaves_the_queue() -> None:
    body = part("model", b"fake") + sound(bytes(30_000)) + END
    head = f"POST {AUDIO} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += f"content-type: {KIND['content-type']}\r\n\r\n"
    with (
        serve(slow := FakeVLLM(tokens=10_000, gap=0.01)) as url,
        gateway(f"fake={url}", worker_seats=1) as client,
    ):
        with held(client):
            for whole in (body, body[:-1]):
                with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as caller:
                    caller.sendall(head.encode() + whole)
                    wait_until(lambda: metric(client, "cairn_gateway_queue_requests") == 1)
                wait_until(lambda: metric(client, "cairn_gateway_queue_requests") == 0)
        wait_until(lambda: quiet(client))
    assert [path for path, _ in slow.asked] == ["/v1/chat/completions"]


class Caller:
    """Sends a body part by part, and stays."""

    def __init__(self, *parts: bytes) -> None:
        self.parts, self.sent, self.busy = parts, 0, False

    async def receive(self) -> Part:
        assert not self.busy, "two at once"
        self.busy = True
        await asyncio.sleep(0)
        self.busy = False
        self.sent += 1
        return self.parts[self.sent - 1], self.sent < len(self.parts)


async def waited(caller: Caller, turns: int) -> bytes:
    """The body as the worker gets it, after so many turns of the loop in the queue."""
    upload = Upload(KIND["content-type"].encode(), None, caller.receive)
    await upload.look(MIB)
    upload.decide("fake")
    ears = asyncio.create_task(upload.listen())
    for _ in range(turns):
        await asyncio.sleep(0)
    assert caller.sent < len(caller.parts) or sum(map(len, caller.parts)) < 2 * AHEAD_BYTES
    try:
        return b"".join([part async for part in upload])
    finally:
        await asyncio.wait_for(ears, 60)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("parts", [1, 3, 100])
def test_what_was_read_while_it_waited_reaches_the_worker_in_its_place(turns: int, parts: int) -> None:
    file = os.urandom(parts * 10_000)
    body = part("model", b"fake") + sound(file) + END
    cuts = [body[at : at + 10_000] for at in range(0, len(body), 10_000)]
    assert asyncio.run(waited(Caller(*cuts), turns)) == body


@pytest.mark.parametrize("turns", [0, 1000])
def test_what_is_wrong_with_an_upload_is_told_to_who_reads_it(turns: int) -> None:
    with pytest.raises(BadRequest, match="`model` field once"):
        asyncio.run(waited(Caller(part("model", b"fake"), part("model", b"other"), END), turns))
