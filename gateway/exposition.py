"""/metrics of several processes as if they were one: counters, histograms and what is counted now add up; of
other gauges the largest is told, of times of birth the earliest."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# gauges of which each process has its share
SUMMED = frozenset(
    (
        "cairn_gateway_inflight_requests",
        "cairn_gateway_queue_requests",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
        "process_max_fds",
    )
)

Family = list[Any]  # name, documentation, type, [[sample's name, labels, value], …]


def families(registry: CollectorRegistry) -> list[Family]:
    """Everything in plain types."""
    return [
        [m.name, m.documentation, m.type, [[s.name, s.labels, s.value] for s in m.samples]]
        for m in registry.collect()
    ]


def exposition(everybody: Sequence[Iterable[Family]]) -> bytes:
    """The text of all together."""
    merged: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for one in everybody:
        for name, documentation, kind, samples in one:
            _, values = merged.setdefault(name, (Metric(name, documentation, kind), {}))
            for sample, labels, value in samples:
                key = sample, tuple(sorted(labels.items()))
                values[key] = _together(name, kind, sample)((values[key], value)) if key in values else value
    for metric, values in merged.values():
        for (sample, labels), value in values.items():
            metric.add_sample(sample, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Fixed([metric for metric, _ in merged.values()]))
    return generate_latest(registry)


def _together(name: str, kind: str, sample: str) -> Callable[[Iterable[float]], float]:
    if sample.endswith("_created") or name == "process_start_time_seconds":
        return min
    return sum if kind != "gauge" or name in SUMMED else max


class _Fixed(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
