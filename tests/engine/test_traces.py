"""One trace from the caller through the gateway into vLLM."""

import os

import httpx
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.tracing import tracer
from tests.fakes import serve, wait_until
from tests.otlp import Collector, facts

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_vllms_own_spans_join_the_callers_trace(start, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    with serve(collector) as url:
        worker = start(
            "traced", None, weights=tiny, args=("--otlp-traces-endpoint", f"{url}/v1/traces"),
            env={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"},
        ).ready()  # fmt: skip
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        app = create_app(GatewayConfig(workers=[f"smol={worker.url}"]), tracer=tracer(os.environ))
        with serve(app) as gateway, httpx.Client(base_url=gateway, timeout=120, trust_env=False) as client:
            wait_until(lambda: client.get("/health/ready").status_code == 200, 60)
            body = {"model": "smol", "prompt": "one two three", "max_tokens": 4}
            given = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert client.post("/v1/completions", json=body, headers=given).status_code == 200
            wait_until(lambda: any(span.name == "llm_request" for span in collector.spans), 60)
            (call,) = collector.named("text_completion smol")
            (server,) = collector.named("POST /v1/completions")
    (theirs,) = collector.named("llm_request")
    assert theirs.trace_id.hex() == TRACE
    assert theirs.parent_span_id == call.span_id
    assert call.parent_span_id == server.span_id
    assert server.parent_span_id.hex() == PARENT
    assert facts(theirs)["gen_ai.usage.completion_tokens"] == facts(server)["gen_ai.usage.output_tokens"] == 4
