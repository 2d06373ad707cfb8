"""Every metric of the gateway process, declared once, on a registry that is passed in.

Labels are bounded: models and workers are those the fleet registry knows, never text from a request.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from gateway.exchange import Exchange
from gateway.health import STATES as HEALTH_STATES
from router.trust import STATES

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0)
_SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1.0, 5.0)
_LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_LAG_EVERY = 0.25  # seconds between two looks at the loop
_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Counter(prometheus_client.Counter):
    """labels() without its checks for labels that were seen before; remove() forgets them as ever."""

    def labels(self, *values: str) -> Self:  # type: ignore[override]
        return self._metrics.get(values) or super().labels(*values)  # type: ignore[return-value]

    def inc(self, amount: float = 1.0, exemplar: dict[str, str] | None = None) -> None:
        """REQUIRES: 0 <= `amount`, and labels where there are any: unchecked."""
        self._value.inc(amount)


class Histogram(prometheus_client.Histogram):
    """The same for a histogram."""

    def labels(self, *values: str) -> Self:  # type: ignore[override]
        return self._metrics.get(values) or super().labels(*values)  # type: ignore[return-value]


class Metrics:
    """One per application; two gateways in one process do not collide."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._shown: set[tuple[str, ...]] = set()  # labels of `trust`
        self._well: set[tuple[str, ...]] = set()  # of `worker_health`
        counter = partial(Counter, registry=registry)
        seconds = partial(Histogram, buckets=_FAST, registry=registry)
        self.requests = counter("cairn_gateway_requests", "Requests answered.", ["model", "route", "status"])
        self.ttft = Histogram(
            "cairn_gateway_ttft_seconds",
            "Request received to first byte from the worker, with (hit=yes) and without tokens from a cache; "
            "counted when the answer ends, because the worker says then what was cached.",
            ["model", "hit"],
            buckets=_TTFT,
            registry=registry,
        )
        self.inflight = Gauge(
            "cairn_gateway_inflight_requests", "Requests being carried now.", registry=registry
        )
        self.retries = counter(
            "cairn_gateway_retries", "Attempts after the first, by what ended the one before.", ["cause"]
        )
        self.aborts = counter("cairn_gateway_aborts", "Requests whose client hung up before the end.")
        self.broken = counter("cairn_gateway_broken_streams", "Answers a worker stopped in the middle.")
        self.unkeyed = counter(
            "cairn_gateway_unkeyed_requests", "Requests routed without chunk keys, by why.", ["reason"]
        )
        self.index_lookup = seconds("cairn_index_lookup_seconds", "Round trip to the chunk index.")
        self.index_down = counter(
            "cairn_index_down", "Decisions made without the chunk index, which did not answer."
        )
        self.tokenize_seconds = seconds("cairn_tokenize_seconds", "Chat template, tokenizer and chunk keys.")
        self.mismatch = counter(
            "cairn_handshake_mismatch",
            "Workers whose chunk keys or token ids are not ours; routed by hash only.",
            ["kind"],
        )
        self._answers(registry)
        self._routing(registry)
        self._flow(registry)
        self._tenants(registry)
        ProcessCollector(registry=registry)

    def ended(self, exchange: Exchange) -> None:
        """A request is over, one way or another."""
        model, usage = exchange.model, exchange.usage
        self.requests.labels(model, exchange.endpoint.path, str(exchange.status)).inc()
        self.request_seconds.labels(model).observe(exchange.total)
        if exchange.aborted:
            self.aborts.inc()
        if exchange.ttft is None or exchange.status != 200:
            return
        self.ttft.labels(model, "yes" if exchange.cached_tokens else "no").observe(exchange.ttft)
        self.saved.labels(model).inc(exchange.saved_seconds)
        self.prompt_tokens.labels(model).inc(usage.prompt or 0)
        self.completion_tokens.labels(model).inc(usage.completion or 0)
        if exchange.client.streams and usage.completion is not None and usage.completion > 1:
            self.token_seconds.labels(model).observe(
                (exchange.total - exchange.ttft) / (usage.completion - 1)
            )

    async def watch_loop(self) -> None:
        """How late the event loop is, a few times a second, until cancelled."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LAG_EVERY)
            self.loop_lag.observe(max(0.0, time.perf_counter() - before - _LAG_EVERY))

    def decided(self, decision: Mapping[str, Any]) -> None:
        """The router's decision log, as it is written."""
        if decision["index"] != "unused":
            self.index_lookup.observe(decision["lookup_ms"] / 1000)
        if decision["index"] == "down":
            self.index_down.inc()
        if decision["blind"]:
            self.blind.labels(decision["blind"]).inc()
        if shadow := decision["shadow"]:
            self.shadow.labels(shadow["policy"], "yes" if shadow["differs"] else "no").inc()
            self.predicted_seconds.labels(decision["policy"], "used").inc(decision["predicted_ms"] / 1000)
            self.predicted_seconds.labels(shadow["policy"], "shadow").inc(shadow["predicted_ms"] / 1000)

    def learned(self, worker_id: str, predicted: int, actual: int) -> None:
        """A worker said how many prompt tokens were cached, of a request we had predictions for."""
        self.actual_hit.labels(worker_id).inc(actual)
        if predicted:
            self.precision.observe(min(actual, predicted) / predicted)

    def left(self, worker_id: str) -> None:
        """Labels of a worker that is gone go too: names of pods never come back."""
        for counter in (self.decisions, self.predicted_hit, self.actual_hit):
            counter.remove_by_labels({"worker": worker_id})

    def tenant_left(self, tenant: str) -> None:
        """Its last key is gone, and its labels go too."""
        for counter in (self.tenant_requests, self.tenant_tokens, self.tenant_refused):
            counter.remove_by_labels({"tenant": tenant})

    def fleet(self, trust: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """What the index's claims are worth, as of now: worker → part → state and precision."""
        states: dict[tuple[str, ...], str]
        states = {(id_, part): row["state"] for id_, parts in trust.items() for part, row in parts.items()}
        self._shown = _one_hot(self.trust, states, STATES, self._shown)

    def health(self, states: Mapping[str, str]) -> None:
        """Who gets requests, as of now: worker → state."""
        named: dict[tuple[str, ...], str] = {(worker_id,): state for worker_id, state in states.items()}
        self._well = _one_hot(self.worker_health, named, HEALTH_STATES, self._well)

    def _flow(self, registry: CollectorRegistry) -> None:
        self.queue = Gauge("cairn_gateway_queue_requests", "Requests waiting for room.", registry=registry)
        self.queue_wait = Histogram(
            "cairn_gateway_queue_wait_seconds",
            "Wait for room, of the requests that had to wait and got a turn.",
            buckets=_TTFT,
            registry=registry,
        )
        self.refused = Counter(
            "cairn_gateway_queue_refused",
            "Requests that found the queue full (queue_full) or waited too long in it (queue_timeout).",
            ["reason"],
            registry=registry,
        )
        self.retries_denied = Counter(
            "cairn_gateway_retries_denied",
            "Requests not sent to another worker because retries were a tenth of all requests already.",
            registry=registry,
        )
        self.worker_health = Gauge(
            "cairn_gateway_worker_health",
            "1 for the state a ready worker is in: closed (well), open (rested after faults), half_open (one "
            "request may try) or wedged (runs requests and computes nothing).",
            ["worker", "state"],
            registry=registry,
        )

    def _answers(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        self.request_seconds = Histogram(
            "cairn_gateway_request_seconds",
            "Request received to the end of its answer, whatever it was.",
            ["model"],
            buckets=_TTFT,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "cairn_gateway_time_per_output_token_seconds",
            "Of streams that told their usage: first byte to the end, per token after the first.",
            ["model"],
            buckets=_TOKEN,
            registry=registry,
        )
        self.prompt_tokens = counter(
            "cairn_gateway_prompt_tokens", "Prompt tokens of answers that told their usage.", ["model"]
        )
        self.completion_tokens = counter(
            "cairn_gateway_completion_tokens", "Generated tokens of answers that told their usage.", ["model"]
        )
        self.saved = counter(
            "cairn_gateway_saved_seconds",
            "Computing spared by cached tokens, less the time to load them, at the workers' measured rates.",
            ["model"],
        )
        self.loop_lag = Histogram(
            "cairn_gateway_loop_lag_seconds",
            "How late the event loop woke up a timer, looked at four times a second.",
            buckets=_LAG,
            registry=registry,
        )

    def _tenants(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        self.tenant_requests = counter("cairn_tenant_requests", "Requests by tenant.", ["tenant"])
        self.tenant_tokens = counter(
            "cairn_tenant_tokens", "Tokens settled by tenant; kind: prompt or completion.", ["tenant", "kind"]
        )
        self.tenant_refused = counter(
            "cairn_tenant_refusals",
            "Requests refused by tenant and by what was short or wrong: key (then without a tenant), model, "
            "month, concurrency, requests, tokens.",
            ["tenant", "kind"],
        )

    def _routing(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        self.decisions = counter("cairn_router_decisions", "Placements used.", ["policy", "reason", "worker"])
        self.predicted_hit = counter(
            "cairn_router_predicted_hit_tokens", "Prompt tokens the router expected in a cache.", ["worker"]
        )
        self.actual_hit = counter(
            "cairn_router_actual_hit_tokens",
            "Prompt tokens workers reported as cached (vLLM needs --enable-prompt-tokens-details).",
            ["worker"],
        )
        self.precision = Histogram(
            "cairn_router_hit_precision",
            "Share of a request's expected tokens that the worker had.",
            buckets=_SHARES,
            registry=registry,
        )
        self.trust = Gauge(
            "cairn_router_trust",
            "1 for the state the index's claims of a worker are in: what it holds itself (local) and what it "
            "loads from the shared tier (shared).",
            ["worker", "part", "state"],
            registry=registry,
        )
        self.blind = counter(
            "cairn_router_blind_decisions", "Decisions without the index, by why.", ["reason"]
        )
        self.shadow = counter(
            "cairn_router_shadow_decisions",
            "Decisions scored by shadow_policy too, and whether it chose another worker.",
            ["policy", "differs"],
        )
        self.predicted_seconds = counter(
            "cairn_router_predicted_seconds",
            "Predicted time to first token, summed, of the worker used and of the one shadow_policy chose; "
            "counted only with a shadow_policy.",
            ["policy", "role"],
        )


def _one_hot(
    gauge: Gauge, states: Mapping[tuple[str, ...], str], known: Sequence[str], shown: set[tuple[str, ...]]
) -> set[tuple[str, ...]]:
    """1 for the state each is in, 0 for the others; who is gone goes.  Returns the labels shown now."""
    now = {(*labels, state): float(it == state) for labels, it in states.items() for state in known}
    for labels, value in now.items():
        gauge.labels(*labels).set(value)
    for labels in shown - now.keys():
        gauge.remove(*labels)
    return set(now)
