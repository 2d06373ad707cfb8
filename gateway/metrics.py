"""Every metric of the gateway process, declared once, on a registry that is passed in.

Labels are bounded: models and workers are those the fleet registry knows, never text from a request.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0)
_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One per application; two gateways in one process do not collide."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        counter = partial(Counter, registry=registry)
        seconds = partial(Histogram, buckets=_FAST, registry=registry)
        self.requests = counter("cairn_gateway_requests", "Requests answered.", ["model", "route", "status"])
        self.ttft = Histogram(
            "cairn_gateway_ttft_seconds",
            "Request received to first byte from the worker.",
            ["model"],
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
        self.decisions = counter("cairn_router_decisions", "Placements used.", ["policy", "reason", "worker"])
        self.predicted_hit = counter(
            "cairn_router_predicted_hit_tokens", "Prompt tokens the router expected in a cache."
        )
        self.actual_hit = counter(
            "cairn_router_actual_hit_tokens",
            "Prompt tokens workers reported as cached (vLLM needs --enable-prompt-tokens-details).",
        )
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

    def decided(self, decision: Mapping[str, Any]) -> None:
        """The router's decision log, as it is written."""
        if decision["index"] != "unused":
            self.index_lookup.observe(decision["lookup_ms"] / 1000)
        if decision["index"] == "down":
            self.index_down.inc()
