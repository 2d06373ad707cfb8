"""What crosses vLLM's process borders: the step's plans one way, the ranks' words and counts the other."""

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cacheengine.metrics import METRICS, Series, merge
from cacheengine.plan import Plan, Timing


@dataclass
class StepPlans(KVConnectorMetadata):
    """Scheduler → ranks: what to move in this step, and how much of it is prefill."""

    plans: list[Plan] = field(default_factory=list)
    prefill_tokens: int = 0


@dataclass
class RankWords(KVConnectorWorkerMetadata):
    """Ranks → scheduler: by plan, how many ranks spoke and the least of what they kept."""

    words: dict[int, tuple[int, int]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    prefill: list[tuple[int, float]] = field(default_factory=list)  # tokens and seconds of a step

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "RankWords":
        assert isinstance(other, RankWords)
        for plan, (ranks, kept) in other.words.items():
            mine = self.words.get(plan, (0, kept))
            self.words[plan] = (mine[0] + ranks, min(mine[1], kept))
        return self  # timings of one rank are enough: ranks do equal work


@dataclass
class EngineStats(KVConnectorStats):
    """Counts on their way to /metrics: `data["series"]` is [[name, [label values], value], …]."""

    @classmethod
    def of(cls, values: dict[Series, float]) -> "EngineStats":
        return cls(data={"series": [[name, list(labels), value] for (name, labels), value in values.items()]})

    def values(self) -> dict[Series, float]:
        return {(name, tuple(labels)): value for name, labels, value in self.data.get("series", ())}

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        assert isinstance(other, EngineStats)
        total = self.values()
        merge(total, other.values())
        self.data = EngineStats.of(total).data
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line: gauges are left out, they would only repeat."""
        return {
            "_".join((name.removeprefix("cairn_engine_"), *labels)): round(value, 4)
            for (name, labels), value in sorted(self.values().items())
            if name.endswith("_total")
        }

    def is_empty(self) -> bool:
        return not self.data.get("series")


class EngineProm(KVConnectorPromMetrics):
    """The declared metrics as Prometheus series, labelled like vLLM's own plus ours."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        classes = {"counter": self._counter_cls, "gauge": self._gauge_cls}
        self._families = {
            m.name: classes[m.kind](name=m.name, documentation=m.help, labelnames=[*labelnames, *m.labels])
            for m in METRICS
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for (name, labels), value in EngineStats(data=transfer_stats_data).values().items():
            series = self._families[name].labels(*engine, *labels)
            if isinstance(series, Counter):
                series.inc(value)
            elif isinstance(series, Gauge):
                series.set(value)
