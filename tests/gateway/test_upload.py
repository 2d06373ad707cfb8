"""Multipart bodies on their way through: the model is found, the rest is streamed."""

import os
import resource
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fakes import serve, wait_until
from tests.gateway.test_endpoints import AUDIO, Scribe, gateway

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
