"""Following vLLM's own prefix cache, per step.   python -m loadtests.micro.bench_device [--quick]

The question: what does publishing the device tier cost vLLM's scheduler thread in one step: noticing what was
evicted (inside vLLM's allocation), claiming what was completed, telling the index writer?
The ceiling is nothing at all; beside it stands what vLLM itself spends on the same step's blocks.

vLLM's real block manager, its device cache full, so that every block it hands out is one it evicts.
"""

import argparse
import statistics
import sys
import time
import warnings
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

from cacheengine.connectors.device import DeviceMap
from cacheengine.connectors.planner import Scheduled
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from loadtests.report import Bar, finish

CHUNK = 256
SCHEME = KeyScheme(namespace_of({"bench": "device"}), CHUNK)
BAR_US = 20.0


class Times(NamedTuple):
    """Seconds of one step."""

    vllm: float  # allocate_slots of everything in it
    ours: float  # step() and merge()


class Engine:
    """vLLM's block manager with `prompts` worth of room, and a device map or none."""

    def __init__(self, block: int, tokens: int, watched: bool) -> None:
        self.block = block
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block, sha256)
        spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=64, dtype=torch.float32)
        group = KVCacheGroupSpec(["layer"], spec)
        config = KVCacheConfig(num_blocks=tokens // block + 1, kv_cache_tensors=[], kv_cache_groups=[group])
        self.manager = KVCacheManager(config, 1 << 17, block, block)
        pool = self.manager.block_pool
        self.device = DeviceMap(pool, CHUNK, CHUNK // block) if watched else None
        self.made = 0
        self.keys: dict[str, list[ChunkKey]] = {}

    def request(self, tokens: int) -> Request:
        self.made += 1
        ids = [self.made, *range(tokens - 1)]
        request = Request(str(self.made), ids, SamplingParams(max_tokens=9), None, block_hasher=self._hasher)
        self.keys[request.request_id] = SCHEME.keys(ids)
        return request

    def step(self, requests: list[Request], new: int) -> Times:
        start = time.perf_counter()
        for request in requests:
            if self.manager.allocate_slots(request, new) is None:
                raise RuntimeError("the pool is too small for this step")
        middle = time.perf_counter()
        scheduled = [
            Scheduled(
                r.request_id, (), r.num_computed_tokens, new, self.manager.get_block_ids(r.request_id)[0]
            )
            for r in requests
        ]
        for request in requests:
            request.num_computed_tokens += new
        began = time.perf_counter()
        if self.device is not None:
            self.device.step(scheduled, self.keys.__getitem__)
            self.device.merge((), _nothing)
        return Times(middle - start, time.perf_counter() - began)

    def end(self, request: Request) -> None:
        self.manager.free(request)
        del self.keys[request.request_id]
        if self.device is not None:
            self.device.end(request.request_id)


def _nothing(key: ChunkKey) -> int:
    return 0


def prefills(engine: Engine, tokens: int, rounds: int) -> list[Times]:
    """Steps of one fresh prompt each, once the cache is full."""
    times = []
    for n in range(rounds + 10):
        request = engine.request(tokens)
        took = engine.step([request], tokens)
        engine.end(request)
        if n >= 10:
            times.append(took)
    return times


def decodes(engine: Engine, running: int, rounds: int) -> list[Times]:
    """Steps of one token for each of many requests."""
    times: list[Times] = []
    while len(times) < rounds:
        requests = [engine.request(300) for _ in range(running)]
        engine.step(requests, 300)
        for _ in range(min(64, rounds - len(times))):
            for request in requests:
                request.append_output_token_ids(7)
            times.append(engine.step(requests, 1))
        for request in requests:
            engine.end(request)
    return times


def measure(name: str, block: int, rounds: int) -> dict[str, float]:
    """Microseconds: what vLLM spends, what watching adds to that, what step() and merge() take."""
    found = {}
    for watched in (False, True):
        kind, size = name.split()[:2]
        count = int(size.replace(",", ""))
        if kind == "prefill":
            times = prefills(Engine(block, 6 * count, watched), count, rounds)
        else:
            times = decodes(Engine(block, 6 * 512 * count, watched), count, rounds)
        found[watched] = [1e6 * statistics.median(column) for column in zip(*times, strict=True)]
    return {
        "vLLM": found[False][0],
        "watching": max(0.0, found[True][0] - found[False][0]),
        "step + merge": found[True][1],
    }


ROWS = (
    ("decode 8 requests", 128, True),
    ("decode 64 requests", 128, True),
    ("prefill 2,048 tokens", 128, True),
    ("prefill 2,048 tokens", 16, False),
    ("prefill 8,192 tokens", 16, False),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for CI and a first look")
    rounds = 200 if parser.parse_args().quick else 1500
    table = Table("step", "block", "vLLM µs", "watching µs", "step + merge µs", "added µs")
    results: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    for name, block, judged in ROWS:
        found = measure(name, block, rounds)
        added = found["watching"] + found["step + merge"]
        row = f"{name}, blocks of {block}"
        table.add_row(name, str(block), *(f"{v:.1f}" for v in found.values()), f"{added:.1f}")
        results |= {f"{row}, {column} us": value for column, value in found.items()}
        if judged:  # the CPU backend's blocks; smaller ones are for the record
            bars[f"{row}: added us"] = Bar(added, BAR_US, "lower")
    Console().print(table)
    return finish("device", results, bars)


if __name__ == "__main__":
    sys.exit(main())
