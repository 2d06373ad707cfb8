"""Spans of real requests, as a collector hears them over OTLP."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cacheengine.config import ConfigError
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.spans import caller_context, worker_headers
from gateway.tracing import NO_TRACER, tracer
from tests.fakes import FakeVLLM, refusing_url, serve, slamming
from tests.otlp import Collector, facts

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
SERVER = f"POST {CHAT}"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "a secret of mine"}]}
STREAM = {**BODY, "stream": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    with serve(collector) as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
        yield collector


@contextlib.contextmanager
def gateway(*urls: str, **knobs: Any) -> Iterator[httpx.Client]:
    config = GatewayConfig(workers=[f"fake={url}" for url in urls], **knobs)
    app = create_app(config, tracer=tracer(os.environ))
    with serve(app) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


def test_a_request_is_a_tree_of_its_steps(collector: Collector) -> None:
    with serve(FakeVLLM(cached_tokens=7)) as a, gateway(a) as client:
        client.post(CHAT, json=STREAM)
        (server,) = collector.named(SERVER)
        (call,) = collector.named("chat fake")
        assert collector.children(server) == ["parse", "tokenize", "queue", "lookup", "decide", "chat fake"]
        assert collector.children(call) == ["connect", "first_byte"]
    assert not server.parent_span_id
    assert (server.kind, call.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert len({span.trace_id for span in collector.spans}) == 1
    for span in collector.spans:
        assert server.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server.end_time_unix_nano


def test_spans_say_what_was_decided_and_what_it_cost(collector: Collector) -> None:
    with serve(FakeVLLM(cached_tokens=7)) as a, gateway(a) as client:
        client.post(CHAT, json=BODY)
        (server,) = collector.named(SERVER)
        (call,) = collector.named("chat fake")
        worker = client.get("/admin/workers").json()["workers"][0]["id"]
    said = facts(server)
    assert said["http.request.method"] == "POST"
    assert said["http.route"] == said["url.path"] == CHAT
    assert said["http.response.status_code"] == 200
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.model"] == "fake"
    assert said["gen_ai.usage.input_tokens"] == 9
    assert said["gen_ai.usage.output_tokens"] == 3
    assert said["gen_ai.usage.cache_read.input_tokens"] == 7
    assert said["cairn.expected_hit_tokens"] == 0
    assert said["cairn.reason"] == "no_keys"
    assert said["cairn.policy"] == "predicted_ttft"
    assert said["cairn.worker.id"] == facts(call)["cairn.worker.id"] == worker
    assert facts(call)["server.address"] == "127.0.0.1"
    assert f"{facts(call)['server.port']}" in a
    assert collector.resources[0]["service.name"] == "cairn-gateway"


def test_the_service_is_called_as_the_environment_says(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front-door")
    with serve(FakeVLLM()) as a, gateway(a) as client:
        client.post(CHAT, json=BODY)
        collector.named(SERVER)
    assert collector.resources[0]["service.name"] == "front-door"


def test_the_callers_trace_goes_on_to_the_worker_by_way_of_our_span(collector: Collector) -> None:
    worker = FakeVLLM()
    given = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "theirs=1,others=2"}
    with serve(worker) as a, gateway(a) as client:
        client.post(CHAT, json=BODY, headers=given)
        (server,) = collector.named(SERVER)
        (call,) = collector.named("chat fake")
    assert server.trace_id.hex() == call.trace_id.hex() == TRACE
    assert server.parent_span_id.hex() == PARENT
    (heard,) = worker.headers
    assert heard[b"traceparent"].decode() == f"00-{TRACE}-{call.span_id.hex()}-01"
    assert heard[b"tracestate"] == b"theirs=1,others=2"


def test_a_caller_who_does_not_sample_is_not_recorded_but_passed_on(collector: Collector) -> None:
    worker = FakeVLLM()
    with serve(worker) as a, gateway(a) as client:
        client.post(CHAT, json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        client.post(CHAT, json=BODY)
        collector.named(SERVER)
    assert worker.headers[0][b"traceparent"].startswith(f"00-{TRACE}-".encode())
    assert worker.headers[0][b"traceparent"].endswith(b"-00")
    assert TRACE not in {span.trace_id.hex() for span in collector.spans}


@pytest.mark.parametrize(
    "given",
    [
        [("traceparent", "garbage"), ("tracestate", "a=1")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("traceparent", f"00-{'1' * 32}-{PARENT}-01")],
        [("traceparent", b"00-\xff\xfe")],
        [("tracestate", "a=1")],
    ],
    ids=["garbage", "zero", "twice", "not-ascii", "state-alone"],
)
def test_a_context_that_is_none_starts_a_trace_of_its_own(collector: Collector, given: Any) -> None:
    worker = FakeVLLM()
    with serve(worker) as a, gateway(a) as client:
        assert client.post(CHAT, json=BODY, headers=given).status_code == 200
        (server,) = collector.named(SERVER)
    assert not server.parent_span_id
    assert server.trace_id.hex() != TRACE
    (heard,) = worker.headers
    assert heard[b"traceparent"].split(b"-")[1].decode() == server.trace_id.hex()
    assert b"tracestate" not in heard


@given(
    parent=st.one_of(st.binary(max_size=600), st.just(f"00-{TRACE}-{PARENT}-01".encode())),
    states=st.lists(
        st.one_of(st.binary(max_size=600), st.from_regex(rb"[a-z]{1,9}=[ -~]{0,99}")), max_size=3
    ),
)
def test_no_context_a_caller_makes_up_fails_or_spoils_a_request(parent: bytes, states: list[bytes]) -> None:
    headers = [(b"traceparent", parent), *((b"tracestate", state) for state in states)]
    context = caller_context(headers)
    ours = worker_headers([*headers, (b"x-other", b"1")], context)
    assert [(name, value) for name, value in ours if name == b"x-other"] == [(b"x-other", b"1")]
    assert sum(name == b"traceparent" for name, _ in ours) <= 1
    assert all(value.isascii() and value.decode().isprintable() for _, value in ours)


def test_every_worker_that_was_tried_has_its_span(collector: Collector) -> None:
    with (
        slamming() as (bad, _),
        serve(FakeVLLM()) as good,
        gateway(bad, good, policy="round_robin") as client,
    ):
        assert [client.post(CHAT, json=BODY).status_code for _ in range(2)] == [200, 200]
        servers = collector.named(SERVER, 2)
        calls = collector.named("chat fake", 3)
    (retried,) = [server for server in servers if facts(server)["cairn.retries"] == 1]
    first, second = [call for call in calls if call.parent_span_id == retried.span_id]
    assert facts(first)["error.type"] == "Upstream"
    assert first.status.code == Status.STATUS_CODE_ERROR
    assert facts(second)["http.request.resend_count"] == 1
    assert second.status.code == retried.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize(
    ("model", "status", "error", "code"),
    [
        ("other", 404, "model_not_found", Status.STATUS_CODE_UNSET),
        ("fake", 503, "no_worker", Status.STATUS_CODE_ERROR),
    ],
)
def test_only_our_own_errors_are_errors_of_the_server(
    collector: Collector, model: str, status: int, error: str, code: int
) -> None:
    with gateway(refusing_url()) as client:
        assert client.post(CHAT, json=BODY | {"model": "fake"}).status_code == 503  # and is known now
        assert client.post(CHAT, json=BODY | {"model": model}).status_code == status
        server = collector.named(SERVER, 2)[1]
    assert facts(server)["http.response.status_code"] == status
    assert facts(server)["error.type"] == error
    assert server.status.code == code


def test_a_client_that_hangs_up_ends_its_spans(collector: Collector) -> None:
    slow = FakeVLLM(tokens=10_000, gap=0.01)
    with serve(slow) as a, gateway(a) as client:
        with client.stream("POST", CHAT, json=STREAM) as reply:
            next(reply.iter_raw())
        (server,) = collector.named(SERVER)
        (call,) = collector.named("chat fake")
    assert facts(server)["cairn.client_abort"]
    assert facts(call)["cairn.client_abort"]


def test_nothing_of_prompts_answers_or_keys_is_sent(collector: Collector) -> None:
    with serve(FakeVLLM()) as a, gateway(a) as client:
        client.post(CHAT, json=BODY, headers={"authorization": "Bearer sk-not-for-you"})
        collector.named(SERVER)
    assert collector.heard
    for secret in (b"a secret of mine", b"sk-not-for-you", b"word0"):
        assert secret not in collector.heard


def test_a_collector_that_is_gone_is_nobodys_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", refusing_url())
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    worker = FakeVLLM()
    with serve(worker) as a, gateway(a) as client:
        assert {client.post(CHAT, json=body).status_code for body in [BODY, STREAM] * 10} == {200}
    assert all(b"traceparent" in heard for heard in worker.headers)


def test_without_an_endpoint_the_callers_context_passes_untouched() -> None:
    worker = FakeVLLM()
    given = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "theirs=1"}
    with serve(worker) as a, gateway(a) as client:
        client.post(CHAT, json=BODY, headers=given)
    assert {name.encode(): value.encode() for name, value in given.items()}.items() <= worker.headers[
        0
    ].items()


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracing_is_off_unless_somebody_listens(env: dict[str, str]) -> None:
    assert tracer(env) is NO_TRACER


def test_what_is_off_is_not_imported() -> None:
    code = "import sys, gateway.launch.serve; sys.exit('gateway.spans' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_protocol_we_do_not_speak_is_refused_in_a_sentence() -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with pytest.raises(ConfigError, match="http/protobuf"):
        tracer(env)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gateway.spans", None)
    with pytest.raises(ConfigError, match=r"cairn-serve\[otel\]"):
        tracer({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"})


def test_what_is_queued_is_sent_when_the_gateway_stops(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with serve(FakeVLLM()) as a, gateway(a) as client:
        client.post(CHAT, json=BODY)
        assert not collector.spans
    assert collector.named(SERVER)
