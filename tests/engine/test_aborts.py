"""Clients that hang up on the gateway: vLLM stops generating, and nothing of theirs is under way any more."""

import asyncio
import random
import re
from dataclasses import replace
from pathlib import Path

from loadtests.abort_storm import Plan, storm
from tests.engine.conftest import Start
from tests.engine.test_whole_path import until
from tests.gateway.process import started

FOREVER = 3500  # tokens: as many as the model's context takes, and minutes more than anybody listens


def test_an_abort_at_the_gateway_is_an_abort_in_the_engine(start: Start, tiny: Path, tmp_path: Path) -> None:
    worker = start("aborts", {"host_bytes": 64 << 20}, weights=tiny, args=("--enable-log-requests",)).ready()
    rng = random.Random(11)
    plans = [replace(Plan.draw(rng, "smol", FOREVER), chat=False) for _ in range(120)]  # it has no template
    with started(tmp_path, f"smol={worker.url}", worker_seats=12) as gateway:
        told = asyncio.run(storm(plans, "127.0.0.1", gateway.port, clients=24))
        assert set(told) == {"head", "body", "sent", "first", "middle", "whole"}
        until(lambda: gateway.inflight() == 0)
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        until(lambda gauge=gauge: worker.metric(gauge) == 0)
    # Its Prometheus counters do not tell aborts; its log does, a line for each.
    log = worker.log.read_text(errors="replace")
    reached = len(re.findall(r"Added request \S+", log))
    aborted = len(re.findall(r"Request \S+ aborted", log))
    finished = worker.metric("vllm:request_success_total", finished_reason="length")
    # on a busy machine the engine may be through with 3,500 tokens before its own server has a turn to hear
    assert told["whole"] <= finished <= told["whole"] + 3
    assert aborted == reached - finished
    hung_up = told["first"] + told["middle"] - (finished - told["whole"])
    assert hung_up <= aborted <= told["sent"] + told["first"] + told["middle"]
