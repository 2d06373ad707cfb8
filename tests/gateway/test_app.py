"""The gateway on real sockets, between a real client and workers that behave and misbehave."""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from tests.fakes import FakeVLLM, refusing_url, serve, slamming, wait_until

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}


@contextlib.contextmanager
def gateway(*urls: str, **knobs: Any) -> Iterator[httpx.Client]:
    """A gateway in front of static workers, and a client of it."""
    config = GatewayConfig(workers=[f"fake={url}" for url in urls], **knobs)
    with serve(create_app(config)) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def worker() -> FakeVLLM:
    return FakeVLLM()


@pytest.fixture
def client(worker: FakeVLLM) -> Iterator[httpx.Client]:
    with serve(worker) as url, gateway(url) as client:
        yield client


def metric(client: httpx.Client, line: str) -> float:
    """Sum of the samples whose name and labels start with `line`."""
    samples = client.get("/metrics").text.splitlines()
    return sum(float(sample.rsplit(" ", 1)[1]) for sample in samples if sample.startswith(line))


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def quiet(client: httpx.Client) -> bool:
    """Nothing is held any more: no request in flight, no ticket open."""
    admin = client.get("/admin/workers").json()
    rows = admin["workers"]
    return admin["inflight"] == 0 and not any(row["inflight"] or row["prefilling_tokens"] for row in rows)


def test_the_workers_answer_comes_back_whole(client: httpx.Client) -> None:
    reply = client.post(CHAT, json=BODY)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "word0 word1 word2"
    wait_until(lambda: quiet(client))


def test_a_stream_comes_back_event_by_event(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=STREAM) as reply:
        events = [line for line in reply.iter_lines() if line]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert len(events) == 5
    assert events[-1] == "data: [DONE]"


def test_the_openai_client_works_unchanged(client: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="k") as sdk:
        stream = sdk.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "x"}], stream=True
        )
        words = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert words == ["word0", "word1", "word2"]
        assert [model.id for model in sdk.models.list()] == ["fake"]
        with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
            sdk.chat.completions.create(model="other", messages=[])
        assert caught.value.code == "model_not_found"


def test_the_bytes_of_the_request_travel_untouched(client: httpx.Client, worker: FakeVLLM) -> None:
    raw = '{ "messages" : [], "model":"fake",  "unknown": [1e400, "ü"], "model":"fake"}\n'.encode()
    client.post(CHAT, content=raw)
    assert worker.asked == [(CHAT, raw)]


def test_headers_are_forwarded_except_those_of_the_hop(client: httpx.Client, worker: FakeVLLM) -> None:
    hop = {
        "authorization": "Bearer k",
        "x-request-id": "7",
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "te": "trailers",
    }
    client.post("/v1/completions", json={"model": "fake", "prompt": "x"}, headers=hop)
    (heard,) = worker.headers
    assert heard[b"authorization"] == b"Bearer k"
    assert heard[b"x-request-id"] == b"7"
    assert not heard.keys() & {b"x-hop", b"te", b"x-cairn-explain"}


def test_the_explanation_is_given_to_those_who_ask(client: httpx.Client) -> None:
    assert "x-cairn-worker" not in client.post(CHAT, json=BODY).headers
    explained = client.post(CHAT, json=BODY, headers={"x-cairn-explain": "1"}).headers
    assert explained["x-cairn-reason"] == "no_keys"
    assert explained["x-cairn-expected-hit-tokens"] == "0"
    assert explained["x-cairn-policy"] == "predicted_ttft"
    assert explained["x-cairn-terms"].startswith("queue=0ms, transfer=0ms, compute=")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": 5}', b"\xff", b"[" * 100_000])
def test_a_malformed_body_is_a_400(client: httpx.Client, worker: FakeVLLM, body: bytes) -> None:
    reply = client.post(CHAT, content=body)
    assert reply.status_code == 400
    assert error_of(reply)["type"] == "invalid_request_error"
    assert worker.asked == []


def test_an_unknown_model_is_a_404(client: httpx.Client) -> None:
    reply = client.post(CHAT, json={**BODY, "model": "other"})
    assert reply.status_code == 404
    assert error_of(reply)["code"] == "model_not_found"
    assert error_of(reply)["param"] == "model"


def test_the_only_model_need_not_be_named(client: httpx.Client) -> None:
    assert client.post(CHAT, json={"messages": []}).status_code == 200


def test_what_is_not_served_is_an_openai_error_too(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"))["code"] == "not_found"
    assert client.get(CHAT).status_code == 405
    assert error_of(client.get(CHAT))["type"] == "invalid_request_error"
    assert client.get("/admin/decisions?limit=x").status_code == 400
    assert client.get(f"/admin/decisions?limit={10**20}").status_code in (200, 400)


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_over_the_limit_is_a_413(worker: FakeVLLM, chunked: bool) -> None:
    with serve(worker) as url, gateway(url, max_body_bytes=1000) as client:
        body = b"x" * 1001
        reply = client.post(CHAT, content=iter([body]) if chunked else body)
        assert reply.status_code == 413
        assert error_of(reply)["code"] == "request_too_large"
        assert client.post(CHAT, json=BODY).status_code == 200
    assert len(worker.asked) == 1


def test_nobody_to_ask_is_a_503_with_retry_after() -> None:
    with gateway(refusing_url()) as client:
        reply = client.post(CHAT, json=BODY)
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
    assert reply.status_code == 503
    assert error_of(reply)["code"] == "no_worker"
    assert int(reply.headers["retry-after"]) >= 1


def test_beyond_max_inflight_is_a_503_with_retry_after() -> None:
    slow = FakeVLLM(tokens=1000, gap=0.01)
    with (
        serve(slow) as url,
        gateway(url, max_inflight=1) as client,
        client.stream("POST", CHAT, json=STREAM) as held,
    ):
        chunks = held.iter_raw()
        next(chunks)
        reply = client.post(CHAT, json=BODY)
        assert reply.status_code == 503
        assert error_of(reply)["code"] == "overloaded"
        assert reply.headers["retry-after"]


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500])
def test_a_workers_own_errors_are_relayed_and_not_retried(status: int) -> None:
    one, two = FakeVLLM(status=status), FakeVLLM(status=status)
    with serve(one) as a, serve(two) as b, gateway(a, b) as client:
        reply = client.post(CHAT, json=BODY)
        assert reply.status_code == status
        assert reply.json()["error"]["message"] == "the worker says no"
        assert client.get("/health/ready").json()["workers"] == 2
    assert len(one.asked) + len(two.asked) == 1


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["json", "stream"])
def test_a_busy_worker_is_replaced_by_another(body: dict[str, Any]) -> None:
    busy, idle = FakeVLLM(status=503), FakeVLLM()
    with serve(busy) as a, serve(idle) as b, gateway(a, b, policy="round_robin") as client:
        wait_until(lambda: client.get("/health/ready").json()["workers"] == 2)
        assert [client.post(CHAT, json=body).status_code for _ in range(4)] == [200] * 4
        assert metric(client, "cairn_gateway_retries_total") == len(busy.asked) > 0
        wait_until(lambda: quiet(client))


def test_when_every_worker_is_busy_the_client_may_come_back() -> None:
    with serve(FakeVLLM(status=503)) as a, serve(FakeVLLM(status=503)) as b, gateway(a, b) as client:
        reply = client.post(CHAT, json=BODY)
    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    assert error_of(reply)["code"] == "no_worker"


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["json", "stream"])
def test_a_worker_that_closes_before_its_first_byte_is_replaced(body: dict[str, Any]) -> None:
    with slamming() as (a, heard), serve(FakeVLLM()) as b, gateway(a, b, policy="round_robin") as client:
        assert [client.post(CHAT, json=body).status_code for _ in range(4)] == [200] * 4
        wait_until(lambda: quiet(client))
    assert [head for head in heard if head.startswith(b"POST")]


def test_a_request_that_kills_workers_is_not_passed_along_for_ever() -> None:
    with slamming() as (a, x), slamming() as (b, y), slamming() as (c, z), gateway(a, b, c) as client:
        reply = client.post(CHAT, json=BODY)
        assert reply.status_code == 502
        assert error_of(reply)["code"] == "upstream_error"
        assert a not in reply.text
    assert sum(head.startswith(b"POST") for head in x + y + z) == 2


def test_a_worker_that_dies_between_its_headers_and_its_first_word_is_replaced() -> None:
    dying, well = FakeVLLM(die_after=0), FakeVLLM()
    with serve(dying) as a, serve(well) as b, gateway(a, b, policy="round_robin") as client:
        replies = [client.post(CHAT, json=STREAM) for _ in range(4)]
    assert all(b"[DONE]" in reply.content and b"error" not in reply.content for reply in replies)
    assert dying.asked


@pytest.mark.parametrize("torn", [False, True], ids=["at-an-event", "inside-an-event"])
def test_a_worker_that_dies_in_mid_stream_ends_it_with_an_error_event(torn: bool) -> None:
    with serve(FakeVLLM(tokens=9, die_after=4, torn=torn)) as a, gateway(a) as client:
        reply = client.post(CHAT, json=STREAM)
        events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]
        assert len(events) == 5
        assert events[-1]["error"]["code"] == "upstream_error"
        assert metric(client, "cairn_gateway_broken_streams_total") == 1
        wait_until(lambda: quiet(client))


def test_the_openai_client_raises_when_a_worker_dies_in_mid_stream() -> None:
    with (
        serve(FakeVLLM(tokens=9, die_after=4, torn=True)) as a,
        gateway(a) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="k", max_retries=0) as sdk,
    ):
        stream = sdk.chat.completions.create(model="fake", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="closed the connection"):
            list(stream)


def test_a_worker_that_dies_in_the_middle_of_a_json_answer_cuts_it() -> None:
    with serve(FakeVLLM(die_after=1)) as a, gateway(a) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(CHAT, json=BODY)
        wait_until(lambda: quiet(client))


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["json", "stream"])
def test_a_worker_silent_before_its_first_byte_is_a_504_and_is_hung_up_on(body: dict[str, Any]) -> None:
    slow, other = FakeVLLM(gap=60), FakeVLLM(gap=60)
    with (
        serve(slow) as a,
        serve(other) as b,
        gateway(a, b, first_byte_timeout_seconds=0.2) as client,
    ):
        reply = client.post(CHAT, json=body)
        assert reply.status_code == 504
        assert error_of(reply)["code"] == "upstream_timeout"
        wait_until(lambda: slow.aborted + other.aborted == 1)
        wait_until(lambda: quiet(client))
    assert len(slow.asked) + len(other.asked) == 1


def test_a_worker_silent_in_mid_stream_ends_it_with_an_error_event() -> None:
    slow = FakeVLLM(tokens=2, gap=0.0)
    slow.gaps = [0.0, 60.0]
    with serve(slow) as a, gateway(a, idle_timeout_seconds=0.2) as client:
        reply = client.post(CHAT, json=STREAM)
        assert b"upstream_timeout" in reply.content
        wait_until(lambda: slow.aborted == 1)


def test_a_client_that_hangs_up_on_a_stream_hangs_up_on_the_worker() -> None:
    slow = FakeVLLM(tokens=10_000, gap=0.01)
    with serve(slow) as a, gateway(a) as client:
        with client.stream("POST", CHAT, json=STREAM) as reply:
            next(reply.iter_raw())
        wait_until(lambda: slow.aborted == 1)
        wait_until(lambda: quiet(client))
        assert metric(client, "cairn_gateway_aborts_total") == 1


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["json", "stream"])
def test_a_client_that_hangs_up_before_the_first_byte_hangs_up_on_the_worker(body: dict[str, Any]) -> None:
    slow = FakeVLLM(gap=60)
    with serve(slow) as a, gateway(a) as client:
        with (
            httpx.Client(base_url=client.base_url, trust_env=False) as impatient,
            pytest.raises(httpx.ReadTimeout),
        ):
            impatient.post(CHAT, json=body, timeout=0.2)
        wait_until(lambda: slow.aborted == 1)
        wait_until(lambda: quiet(client))
        assert (
            metric(
                client, 'cairn_gateway_requests_total{model="fake",route="/v1/chat/completions",status="499"}'
            )
            == 1
        )


def test_a_dead_worker_gets_no_traffic_until_it_is_well_again() -> None:
    dead = refusing_url()
    with serve(FakeVLLM()) as a, gateway(dead, a) as client:
        assert client.get("/health/ready").json()["workers"] == 1
        assert client.post(CHAT, json=BODY).status_code == 200
        states = {row["url"]: row["state"] for row in client.get("/admin/workers").json()["workers"]}
    assert states == {dead: "down", a: "ready"}


def test_what_workers_report_as_cached_is_counted(client: httpx.Client, worker: FakeVLLM) -> None:
    worker.cached_tokens = 7
    for body in (BODY, STREAM):
        client.post(CHAT, json=body)
    assert metric(client, "cairn_router_actual_hit_tokens_total") == 14


def test_every_decision_can_be_read_back(client: httpx.Client) -> None:
    client.post(CHAT, json=BODY)
    (decision,) = client.get("/admin/decisions").json()["decisions"]
    assert decision["model"] == "fake"
    assert decision["reason"] == "no_keys"
    assert decision["blind"] == "no_index"


def test_whatever_clients_and_workers_do_nothing_stays_held() -> None:
    slow = FakeVLLM(tokens=20, gap=0.005)
    dying = FakeVLLM(tokens=20, gap=0.005, die_after=10, torn=True)
    dice = random.Random(7)

    async def caller(client: httpx.AsyncClient, body: dict[str, Any], patience: float) -> None:
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(patience):
                await client.post(CHAT, json=body)

    async def crowd(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False, limits=httpx.Limits()) as client:
            calls = [
                caller(client, dice.choice([BODY, STREAM, {"model": "other"}]), patience)
                for patience in [60.0] * 10 + [dice.random() / 2 for _ in range(190)]
            ]
            await asyncio.gather(*calls)

    with serve(slow) as a, serve(dying) as b, slamming() as (c, _), gateway(a, b, c) as client:
        asyncio.run(crowd(str(client.base_url)))
        wait_until(lambda: quiet(client))
        wait_until(lambda: slow.running + dying.running == 0)
        assert metric(client, "cairn_gateway_inflight_requests") == 0
        assert 0 < metric(client, "cairn_gateway_requests_total") <= 200  # some left before they were heard
        dying.die_after = None  # or it may tear the last answer too
        assert client.post(CHAT, json=BODY).status_code in (200, 502)


@pytest.mark.parametrize("told", ["header", "prompt_cache_key", "user"])
def test_a_session_stays_with_its_worker_however_it_is_named(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nobody leaves the ring because this machine is slow, and 24 sessions have one home of four by chance
    # only once in 4^23, wherever the ports put them
    monkeypatch.setattr("router.probe.HEALTH_SECONDS", 30.0)
    houses = [FakeVLLM() for _ in range(4)]
    with contextlib.ExitStack() as opened:
        urls = [opened.enter_context(serve(house)) for house in houses]
        client = opened.enter_context(gateway(*urls, policy="session", connect_timeout_seconds=30))
        wait_until(lambda: client.get("/health/ready").json()["workers"] == len(houses))
        homes = set()
        for session in (f"session {i}" for i in range(24)):
            seen = set()
            for n in range(2):
                body = {**BODY, "messages": [{"role": "user", "content": f"{session} {n}"}]}
                named = {} if told == "header" else {told: session}
                headers = {"x-cairn-explain": "1"} | ({"x-session-id": session} if told == "header" else {})
                said = client.post("/admin/route/explain", json=body | named, headers=headers).json()
                reply = client.post(CHAT, json=body | named, headers=headers)
                assert reply.headers["x-cairn-worker"] == said["worker"]
                seen.add(said["worker"])
            assert len(seen) == 1
            homes |= seen
        assert len(homes) > 1


def test_many_workers_that_do_not_answer_do_not_keep_the_others_from_being_asked(worker: FakeVLLM) -> None:
    with socket.socket() as silent, serve(worker) as url:
        silent.bind(("0.0.0.0", 0))
        silent.listen(256)  # connections are made, and nobody ever reads them
        port = silent.getsockname()[1]
        with gateway(*(f"http://127.0.1.{n}:{port}" for n in range(1, 121)), url) as client:
            rows = client.get("/admin/workers").json()["workers"]
            states = {row["url"]: row["state"] for row in rows}
            assert states.pop(url) == "ready"
            assert set(states.values()) == {"down"}
            assert len(states) == 120
