"""Every metric of the engine, declared once.  They appear in the worker's own /metrics beside vLLM's.

Both halves of the connector count into a plain dict; vLLM carries it to the API server process, where the
declared Prometheus metrics are observed.  docs/metrics.md is generated from this table.
"""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("cairn_engine_lookup_tokens_total", "counter", "Prompt tokens looked up in the cache."),
    Metric("cairn_engine_hit_tokens_total", "counter", "Prompt tokens loaded from a tier.", ("tier",)),
    Metric(
        "cairn_engine_failed_tokens_total", "counter", "Tokens promised by the map that had to be recomputed."
    ),
    Metric(
        "cairn_engine_declined_tokens_total",
        "counter",
        "Tokens a tier held that were computed because that was quicker than loading.",
        ("tier",),
    ),
    Metric("cairn_engine_saved_chunks_total", "counter", "Chunks stored in a tier.", ("tier",)),
    Metric(
        "cairn_engine_dropped_chunks_total",
        "counter",
        "Chunks handed to a tier that it did not keep.",
        ("tier",),
    ),
    Metric("cairn_engine_evicted_chunks_total", "counter", "Chunks evicted to make room.", ("tier",)),
    Metric(
        "cairn_engine_unwritten_chunks_total",
        "counter",
        "Chunks that left the host tier before they were written to this one.",
        ("tier",),
    ),
    Metric("cairn_engine_moved_bytes_total", "counter", "Bytes moved, one rank each.", ("tier", "op")),
    Metric("cairn_engine_moved_seconds_total", "counter", "Seconds spent moving them.", ("tier", "op")),
    Metric("cairn_engine_bad_frames_total", "counter", "Stored chunks that failed verification.", ("tier",)),
    Metric(
        "cairn_engine_verify_failures_total", "counter", "KV pages that differed after a load (verify_loads)."
    ),
    Metric(
        "cairn_engine_probe_timeouts_total", "counter", "Redis look-ups that took too long and were a miss."
    ),
    Metric("cairn_engine_index_written_total", "counter", "Entries the index took, announcements included."),
    Metric(
        "cairn_engine_index_overflows_total",
        "counter",
        "Times the index queue overflowed and was dropped; a new announcement of all chunks heals it.",
    ),
    Metric(
        "cairn_engine_index_announcements_total",
        "counter",
        "Times all chunks were announced: at the start, and again after an overflow or a loss.",
    ),
    Metric(
        "cairn_engine_index_losses_total",
        "counter",
        "Times Redis had forgotten what it acknowledged, or the lease had run out.",
    ),
    Metric(
        "cairn_engine_index_mended_total",
        "counter",
        "Entries that were missing or wrong in the index when they were compared, and were put right.",
    ),
    Metric(
        "cairn_engine_index_errors_total", "counter", "Lost connections to the index and refused commands."
    ),
    Metric(
        "cairn_engine_read_bytes_per_second",
        "gauge",
        "Measured speed of loads from a tier, one rank (host: into the blocks); decides load or compute.",
        ("tier",),
    ),
    Metric("cairn_engine_prefill_tokens_per_second", "gauge", "Measured speed of computing."),
    Metric("cairn_engine_breaker_open", "gauge", "1 while a tier's circuit breaker is open.", ("tier",)),
    Metric(
        "cairn_engine_backlog_chunks",
        "gauge",
        "Chunks of the host tier still to be written to a tier.",
        ("tier",),
    ),
    Metric("cairn_engine_used_chunks", "gauge", "Chunks a tier holds.", ("tier",)),
    Metric("cairn_engine_capacity_chunks", "gauge", "Chunks a tier can hold.", ("tier",)),
)
# of the index writer's counters, those above
INDEX_COUNTS = ("written", "overflows", "announcements", "losses", "mended", "errors")
KINDS = {metric.name: metric.kind for metric in METRICS}

Series = tuple[str, tuple[str, ...]]  # metric name, label values


class Tally:
    """Counts since the last take().  Not thread-safe: whoever shares one holds a lock."""

    def __init__(self) -> None:
        self._values: dict[Series, float] = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        if value:
            series = (name, labels)
            self._values[series] = self._values.get(series, 0.0) + value

    def set(self, name: str, value: float, *labels: str) -> None:
        self._values[name, labels] = value

    def take(self) -> dict[Series, float]:
        values, self._values = self._values, {}
        return values


def merge(into: dict[Series, float], other: dict[Series, float]) -> None:
    """Counters add up; of a gauge the later word stands."""
    for series, value in other.items():
        if KINDS[series[0]] == "counter":
            into[series] = into.get(series, 0.0) + value
        else:
            into[series] = value
