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
    with serve(slow) as url, gateway(url, total_timeout_seconds=2) as client:
        reply = client.post(CHAT, json=BODY)
        assert reply.status_code == 504
        assert error_of(reply)["code"] == "request_timeout"
        wait_until(lambda: slow.aborted == 1)
        wait_until(lambda: quiet(client))


def test_a_stream_that_takes_too_long_in_all_ends_with_an_error_event() -> None:
    slow = FakeVLLM(tokens=10_000, gap=0.01)
    with serve(slow) as url, gateway(url, total_timeout_seconds=3) as client:
        events = [event for event in client.post(CHAT, json=STREAM).text.split("\n\n") if event]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert json.loads(events[0].removeprefix("data: "))["choices"]
        wait_until(lambda: slow.aborted == 1)


KEEPALIVE = ": keepalive"


def slow_start(seconds: float, **more: Any) -> FakeVLLM:
    return FakeVLLM(gaps=[seconds], **more)


def test_who_waits_for_a_stream_hears_comments_and_then_the_stream() -> None:
    with serve(slow_start(0.5)) as url, gateway(url, keepalive_seconds=0.1) as client:
        reply = client.post(CHAT, json=STREAM)
        events = [event for event in reply.text.split("\n\n") if event]
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream")
        comments = events.count(KEEPALIVE)
        assert comments >= 1
        assert events[:comments] == [KEEPALIVE] * comments  # none later: the stream speaks for itself
        assert len(events) == comments + 5
        assert events[-1] == "data: [DONE]"
        wait_until(lambda: quiet(client))


def test_the_sdk_skips_comments() -> None:
    with serve(slow_start(0.5)) as url, gateway(url, keepalive_seconds=0.1) as client, sdk(client) as caller:
        stream = caller.chat.completions.create(model="fake", messages=[], stream=True)
        words = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert words == ["word0", "word1", "word2"]


@pytest.mark.parametrize("knobs", [{"keepalive_seconds": 0}, {"keepalive_seconds": 600}], ids=["off", "rare"])
def test_a_stream_that_need_not_speak_up_is_as_the_worker_sent_it(knobs: dict[str, float]) -> None:
    with serve(slow_start(0.2)) as url, gateway(url, **knobs) as client:
        reply = client.post(CHAT, json=STREAM)
        assert KEEPALIVE not in reply.text
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_an_answer_that_is_no_stream_has_no_comments() -> None:
    with serve(slow_start(0.5, tokens=1)) as url, gateway(url, keepalive_seconds=0.05) as client:
        assert client.post(CHAT, json=BODY).json()["choices"]


def test_comments_are_heard_in_the_queue_too_and_its_refusal_is_an_event() -> None:
    with (
        serve(FakeVLLM(tokens=10_000, gap=0.01)) as url,
        gateway(url, worker_seats=1, queue_timeout_seconds=0.5, keepalive_seconds=0.1) as client,
        held(client),
        sdk(client) as caller,
    ):
        stream = caller.chat.completions.create(model="fake", messages=[], stream=True)
        assert stream.response.status_code == 200
        with pytest.raises(openai.APIError, match="No worker had room") as caught:
            list(stream)
        assert caught.value.code == "queue_timeout"


def test_a_worker_may_still_be_replaced_after_a_comment() -> None:
    dying, well = FakeVLLM(pause=0.5, die_after=0), FakeVLLM()
    with (
        serve(dying) as a,
        serve(well) as b,
        gateway(a, b, policy="round_robin", keepalive_seconds=0.1) as client,
    ):
        replies = [client.post(CHAT, json=STREAM).text for _ in range(2)]
    assert len(dying.asked) == 1
    assert len(well.asked) == 2
    assert all("[DONE]" in reply and "error" not in reply for reply in replies)
    assert any(reply.startswith(KEEPALIVE) for reply in replies)


def test_a_workers_refusal_keeps_its_status_before_the_first_comment_and_is_an_event_after() -> None:
    for pause, keepalive in ((0.0, 60.0), (0.5, 0.1)):
        refusing = FakeVLLM(status=422, pause=pause)
        with serve(refusing) as url, gateway(url, keepalive_seconds=keepalive) as client:
            reply = client.post(CHAT, json=STREAM)
            assert reply.status_code == (200 if pause else 422)
            last = reply.text.rstrip().rpartition("\n")[2].removeprefix("data: ")
            assert json.loads(last)["error"]["message"] == "the worker says no"
            with sdk(client) as caller, pytest.raises(openai.APIError, match="the worker says no"):
                list(caller.chat.completions.create(model="fake", messages=[], stream=True))


def test_who_hangs_up_among_comments_hangs_up_on_the_worker() -> None:
    slow = FakeVLLM(gap=60)
    with serve(slow) as url, gateway(url, keepalive_seconds=0.05) as client:
        with client.stream("POST", CHAT, json=STREAM) as reply:
            lines = reply.iter_lines()
            assert next(lines) == KEEPALIVE
        wait_until(lambda: slow.aborted == 1)
        wait_until(lambda: quiet(client))
