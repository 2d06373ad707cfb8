"""Spans of a request for OpenTelemetry, made of recorded times, and the W3C context on to the worker.

    POST /v1/chat/completions        SERVER; continues the caller's trace, if it has one
      parse, tokenize, queue, lookup, decide
      chat <model>                   CLIENT, one for each worker tried; vLLM's own spans go under it
        connect                      until there is a connection, new or kept
        first_byte                   until the worker's first byte

Attributes without a name of ours are those of opentelemetry.io/docs/specs/semconv/http/http-spans and
…/semconv/gen-ai/gen-ai-spans; `cairn.*` is what no convention knows.  Never a word of a prompt or an answer.
The SDK reads its own standard variables (service name, sampler, headers, queue, timeouts).  Its queue is
bounded and drops; its errors are log lines of a thread of its own.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.exchange import Exchange
from gateway.proxy import Client
from gateway.trace import Attempt, Trace
from gateway.tracing import Tracer
from gateway.wire import Headers
from router.placement import Placement

_CONTEXT = (b"traceparent", b"tracestate")
_LAST_WORDS_SECONDS = 3.0  # to send what is queued when the gateway stops
_OPERATIONS = {  # gen_ai.operation.name
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_w3c = TraceContextTextMapPropagator()


class OtelTracer(Tracer):
    """REQUIRES: one per process; close() at its end."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        # what the environment says wins over our name
        named = Resource.create({SERVICE_NAME: "cairn-gateway"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cairn.gateway")

    def begin(self, client: Client, route: str, arrived: float) -> Trace:
        # the monotonic clock measures, the wall clock dates
        epoch = time.time_ns() - int(time.perf_counter() * 1e9)
        span = self._tracer.start_span(
            f"{client.method} {route}",
            caller_context(client.headers),
            SpanKind.SERVER,
            {"http.request.method": client.method, "http.route": route, "url.scheme": client.scheme},
            start_time=epoch + int(arrived * 1e9),
        )
        return _Trace(self._tracer, span, epoch)

    def ended(self, exchange: Exchange) -> None:
        if isinstance(exchange.trace, _Trace):
            exchange.trace.ended(exchange)

    async def close(self) -> None:
        # a thread that is not waited for at exit: an exporter that retries would keep the process
        closing = threading.Thread(target=self._provider.shutdown, name="otel-shutdown", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _LAST_WORDS_SECONDS)


class _Trace(Trace):
    def __init__(self, tracer: otel.Tracer, span: Span, epoch: int) -> None:
        self.tracer, self._span, self._epoch = tracer, span, epoch
        self.context = otel.set_span_in_context(span, Context())
        self.id = otel.format_trace_id(span.get_span_context().trace_id)

    def at(self, moment: float) -> int:
        """Nanoseconds of the epoch, as OpenTelemetry wants them."""
        return self._epoch + int(moment * 1e9)

    def child(
        self,
        name: str,
        context: Context,
        started: float,
        ended: float,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if self._span.is_recording():  # or the trace is not sampled
            span = self.tracer.start_span(name, context, attributes=facts, start_time=self.at(started))
            span.end(self.at(ended))

    def step(self, name: str, started: float) -> float:
        ended = time.perf_counter()
        self.child(name, self.context, started, ended)
        return ended

    def placed(self, started: float, decision: Mapping[str, Any]) -> None:
        found = started + decision["lookup_ms"] / 1000
        self.child("lookup", self.context, started, found, {"cairn.index": decision["index"]})
        facts = {
            "cairn.policy": decision["ran"],
            "cairn.candidates": len(decision["order"]),
            "cairn.predicted_ms": decision["predicted_ms"],
        }
        self.child("decide", self.context, found, time.perf_counter(), facts)

    def attempt(self, placement: Placement, path: str, model: str, before: int) -> Attempt:
        return _Attempt(self, placement, path, model, before)

    def ended(self, exchange: Exchange) -> None:
        self._span.set_attributes(_given(_facts(exchange)))
        if exchange.status >= 500:  # a server's 4xx is its client's error
            self._span.set_status(Status(StatusCode.ERROR, exchange.failure or None))
        self._span.end(self.at(exchange.arrived + exchange.total))


class _Attempt(Attempt):
    def __init__(self, trace: _Trace, placement: Placement, path: str, model: str, before: int) -> None:
        self._trace = trace
        self._started = self._waiting = time.perf_counter()
        url = urlsplit(placement.worker.url)
        operation = _OPERATIONS.get(path)
        facts = {
            "http.request.method": "POST",
            "http.request.resend_count": before or None,
            "server.address": url.hostname,
            "server.port": url.port or {"http": 80, "https": 443}.get(url.scheme),
            "gen_ai.provider.name": "vllm",
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            **_placement(placement),
        }
        self._span = trace.tracer.start_span(
            f"{operation} {model}" if operation else "POST",
            trace.context,
            SpanKind.CLIENT,
            _given(facts),
            start_time=trace.at(self._started),
        )
        self._context = otel.set_span_in_context(self._span, Context())
        self.connected = self._connection if self._span.is_recording() else None

    def _connection(self) -> None:
        self._waiting = time.perf_counter()
        self._trace.child("connect", self._context, self._started, self._waiting)

    def headers(self, given: Headers) -> Headers:
        return worker_headers(given, self._context)

    def first_byte(self, status: int) -> None:
        self._trace.child("first_byte", self._context, self._waiting, time.perf_counter())
        self._span.set_attribute("http.response.status_code", status)
        if status >= 400:
            self._failed(str(status))

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._span.set_attribute("cairn.client_abort", True)
        elif kind is not None:
            self._failed(kind.__name__)
        self._span.end(self._trace.at(time.perf_counter()))

    def _failed(self, what: str) -> None:
        self._span.set_attribute("error.type", what)
        self._span.set_status(Status(StatusCode.ERROR))


def _facts(exchange: Exchange) -> dict[str, Any]:
    usage, prompt, placement = exchange.usage, exchange.prompt, exchange.placement
    return {
        "url.path": exchange.path,
        "http.response.status_code": exchange.client.status or None,
        "error.type": exchange.failure or (str(exchange.status) if exchange.status >= 500 else None),
        "gen_ai.operation.name": _OPERATIONS.get(exchange.path),
        "gen_ai.request.model": exchange.model,
        "gen_ai.usage.input_tokens": usage.prompt,
        "gen_ai.usage.output_tokens": usage.completion,
        "gen_ai.usage.cache_read.input_tokens": usage.cached,
        "cairn.prompt_tokens": prompt.tokens if prompt else None,
        "cairn.retries": max(0, exchange.attempts - 1),
        "cairn.request_id": exchange.request_id or None,
        "cairn.tenant": exchange.caller.name or None,
        "cairn.client_abort": exchange.aborted or None,
        **(_placement(placement) if placement else {}),
    }


def _placement(placement: Placement) -> dict[str, Any]:
    return {
        "cairn.worker.id": placement.worker.id,
        "cairn.reason": placement.reason,
        "cairn.policy": placement.policy,
        "cairn.expected_hit_tokens": placement.expected_hit_tokens,
    }


def _given(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def caller_context(headers: Headers) -> Context:
    """The caller's context, empty unless it gave exactly one that is valid (w3.org/TR/trace-context)."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return Context()
    carrier = {"traceparent": parents[0].decode("latin-1")}
    if states := [value.decode("latin-1") for name, value in headers if name == b"tracestate"]:
        carrier["tracestate"] = ",".join(states)
    return _w3c.extract(carrier, Context())


def worker_headers(given: Headers, context: Context) -> Headers:
    """The caller's headers with this context instead of theirs."""
    ours: dict[str, str] = {}
    _w3c.inject(ours, context)
    kept = [(name, value) for name, value in given if name not in _CONTEXT]
    return kept + [(name.encode(), value.encode("latin-1")) for name, value in ours.items()]
