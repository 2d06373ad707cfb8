"""What a client hears while it waits, and when it has waited long enough: real sockets, the official SDK."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.test_app import BODY, CHAT, STREAM, error_of, gateway, metric, quiet

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def sdk(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="k", max_retries=0) as caller:
        yield caller


@contextlib.contextmanager
def held(client: httpx.Client) -> Iterator[None]:
    """One stream under way for the body of the `with`."""
    with client.stream("POST", CHAT, json=STREAM) as reply:
        chunks = reply.iter_raw()  # closes the stream when it is dropped
        next(chunks)
        yield


@contextlib.contextmanager
def sent(client: httpx.Client, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request by hand; leaving hangs up."""
    data = json.dumps(body).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as caller:
        caller.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data))
        )
        caller.sendall(data)
        yield caller


def in_background(client: httpx.Client, results: list[httpx.Response], **body: Any) -> threading.Thread:
    def call() -> None:
        results.append(client.post(CHAT, json={**BODY, **body}))

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_who_finds_no_seat_waits_for_one() -> None:
    slow = FakeVLLM(tokens=10_000, gap=0.01)
    replies: list[httpx.Response] = []
    with serve(slow) as url, gateway(url, worker_seats=1) as client:
        with held(client):
            waiting = in_background(client, replies)
            wait_until(lambda: metric(client, "cairn_gateway_queue_requests") == 1)
            assert len(slow.asked) == 1
            slow.tokens = 1
        waiting.join()
        assert [reply.status_code for reply in replies] == [200]
        assert metric(client, "cairn_gateway_queue_wait_seconds_count") == 1
        wait_until(lambda: quiet(client))


def test_a_full_queue_is_a_503_the_sdk_understands() -> None:
    with serve(FakeVLLM(tokens=10_000, gap=0.01)) as url, gateway(url, worker_seats=1, max_queue=0) as client:
        with held(client), sdk(client) as caller, pytest.raises(openai.InternalServerError) as caught:
            caller.chat.completions.create(model="fake", messages=[])
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert metric(client, 'cairn_gateway_queue_refused_total{reason="queue_full"}') == 1


def test_too_long_a_wait_is_a_503_the_sdk_understands() -> None:
    with (
        serve(FakeVLLM(tokens=10_000, gap=0.01)) as url,
        gateway(url, worker_seats=1, queue_timeout_seconds=0.05) as client,
    ):
        with held(client), sdk(client) as caller, pytest.raises(openai.InternalServerError) as caught:
            caller.chat.completions.create(model="fake", messages=[])
        assert (caught.value.status_code, caught.value.code) == (503, "queue_timeout")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        wait_until(lambda: quiet(client))
        assert metric(client, "cairn_gateway_queue_requests") == 0


def test_who_hangs_up_in_the_queue_is_never_sent() -> None:
    slow = FakeVLLM(tokens=10_000, gap=0.01)
    with serve(slow) as url, gateway(url, worker_seats=1) as client:
        with held(client):
            with sent(client, BODY):
                wait_until(lambda: metric(client, "cairn_gateway_queue_requests") == 1)
            wait_until(lambda: metric(client, "cairn_gateway_queue_requests") == 0)
        wait_until(lambda: quiet(client))
        assert metric(client, "cairn_gateway_aborts_total") == 2
    assert len(slow.asked) == 1


def test_an_answer_that_takes_too_long_in_all_is_a_504() -> None:
    slow = FakeVLLM(gap=60)
    with serve(slow) as url, gateway(url, total_timeout_seconds=0.2) as client:
        reply = client.post(CHAT, json=BODY)
        assert reply.status_code == 504
        assert error_of(reply)["code"] == "request_timeout"
        wait_until(lambda: slow.aborted == 1)
        wait_until(lambda: quiet(client))


def test_a_stream_that_takes_too_long_in_all_ends_with_an_error_event() -> None:
    slow = FakeVLLM(tokens=10_000, gap=0.01)
    with serve(slow) as url, gateway(url, total_timeout_seconds=0.5) as client:
        events = [event for event in client.post(CHAT, json=STREAM).text.split("\n\n") if event]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert json.loads(events[0].removeprefix("data: "))["choices"]
        wait_until(lambda: slow.aborted == 1)
