"""What is counted of a request when it is over."""

import asyncio
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway.endpoints import ENDPOINTS
from gateway.exchange import Exchange, Prompt
from gateway.metrics import Metrics
from gateway.proxy import Client
from gateway.usage import Usage
from router.placement import Placement
from router.worker import Load, Worker

CHAT = "/v1/chat/completions"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def exchange(status: int = 200, *, rate: float = 100.0, expected: int = 0, **known: Any) -> Exchange:
    """One that a worker with this prefill rate (tokens/s) has answered."""
    client = Client({"headers": []}, None, None)  # type: ignore[arg-type]
    client.status, client.streams = status, True
    worker = Worker(id="w1", model="m", url="http://w", load=Load(prefill_rate=rate))
    placement = Placement(worker, expected, {"host": expected}, "hit", "predicted_ttft", {"transfer": 100.0})
    prompt = Prompt("m", (), 50, b"")
    return Exchange(
        client, ENDPOINTS[CHAT], CHAT, 0.0, model="m", prompt=prompt, placement=placement, attempts=1, **known
    )


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"cairn_gateway_{name}", labels) or 0.0


def test_answers_with_and_without_hits_are_two_series(metrics: Metrics) -> None:
    metrics.ended(exchange(ttft=0.1, usage=Usage(50, 5, 40)))
    metrics.ended(exchange(ttft=2.0, usage=Usage(50, 5, 0), expected=40))  # expected, and not so
    metrics.ended(exchange(ttft=0.2, expected=40))  # the worker does not say
    assert value(metrics, "ttft_seconds_sum", model="m", hit="yes") == pytest.approx(0.3)
    assert value(metrics, "ttft_seconds_sum", model="m", hit="no") == 2.0


def test_what_the_cache_saved_is_computing_less_loading(metrics: Metrics) -> None:
    metrics.ended(exchange(ttft=0.1, usage=Usage(50, 5, 40)))
    assert value(metrics, "saved_seconds_total", model="m") == pytest.approx(0.4 - 0.1)


@pytest.mark.parametrize(
    "spared",
    [
        exchange(ttft=0.1, usage=Usage(50, 5, 40), rate=0.0),
        exchange(ttft=0.1, usage=Usage(50, 5, 1)),
        exchange(400, ttft=0.1, usage=Usage(50, 5, 40)),
        exchange(usage=Usage(50, 5, 40)),
    ],
    ids=["no-rate", "dear-to-load", "refused", "no-byte"],
)
def test_nothing_is_saved_by_guesses_or_failures(metrics: Metrics, spared: Exchange) -> None:
    metrics.ended(spared)
    assert value(metrics, "saved_seconds_total", model="m") == 0


def test_tokens_are_counted_by_model_and_paced_after_the_first(metrics: Metrics) -> None:
    metrics.ended(exchange(ttft=1.0, total=3.0, usage=Usage(50, 5, None)))
    assert value(metrics, "prompt_tokens_total", model="m") == 50
    assert value(metrics, "completion_tokens_total", model="m") == 5
    assert value(metrics, "time_per_output_token_seconds_sum", model="m") == pytest.approx(0.5)


def test_a_client_that_left_before_the_first_byte_is_a_499(metrics: Metrics) -> None:
    metrics.ended(exchange(0, total=1.5, aborted=True))
    assert value(metrics, "requests_total", model="m", route=CHAT, status="499") == 1
    assert value(metrics, "aborts_total") == 1
    assert value(metrics, "request_seconds_sum", model="m") == 1.5


def test_a_loop_that_was_held_up_is_seen(metrics: Metrics) -> None:
    async def held() -> None:
        watching = asyncio.create_task(metrics.watch_loop())
        await asyncio.sleep(0)
        time.sleep(0.75)  # three looks long
        while not value(metrics, "loop_lag_seconds_count"):
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(held())
    assert value(metrics, "loop_lag_seconds_sum") >= 0.49


def test_the_process_itself_is_measured(metrics: Metrics) -> None:
    assert metrics.registry.get_sample_value("process_resident_memory_bytes")


def test_a_worker_that_left_leaves_no_labels(metrics: Metrics) -> None:
    for worker in ("w1", "w2"):
        metrics.decisions.labels("predicted_ttft", "hit", worker).inc()
        metrics.decisions.labels("prefix_ring", "index_down", worker).inc()
        metrics.predicted_hit.labels(worker).inc(5)
        metrics.learned(worker, 5, 5)
    metrics.left("w1")
    metrics.left("never-seen")
    named = {s.labels.get("worker") for family in metrics.registry.collect() for s in family.samples}
    assert named == {None, "w2"}
