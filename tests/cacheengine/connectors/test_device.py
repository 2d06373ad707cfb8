"""The device map against vLLM's real KV cache manager: what is published is truly cached, at every step."""

import random

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from cacheengine.connectors.device import DeviceMap
from cacheengine.connectors.planner import Scheduled
from cacheengine.index_schema import DEVICE, HOST, Entry
from cacheengine.keys import KeyScheme, Namespace

BLOCK, PER = 16, 4
CHUNK = BLOCK * PER
SCHEME = KeyScheme(Namespace(b"n" * 16), CHUNK)
PROMPT = list(range(1000, 1000 + 3 * CHUNK + 10))
KEYS = SCHEME.keys(PROMPT)


class Engine:
    """vLLM's own block bookkeeping, driven as its scheduler drives it, with a device map beside it."""

    def __init__(self, blocks: int = 41, caching: bool = True) -> None:
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.manager = KVCacheManager(config, 8192, BLOCK, BLOCK, enable_caching=caching)
        self.pool = self.manager.block_pool
        self.device = DeviceMap(self.pool, CHUNK, PER)
        self.requests: dict[str, Request] = {}
        self.published: dict[bytes, int] = {}
        self.blocks_of: dict[bytes, list[bytes]] = {}  # hashes of a chunk and of all before it
        self.parent_of: dict[bytes, bytes] = {}

    def add(self, req_id: str, tokens: list[int]) -> Request:
        request = Request(
            req_id, list(tokens), SamplingParams(max_tokens=64), None, block_hasher=self._hasher
        )
        self.requests[req_id] = request
        return request

    def run(self, req_id: str, new: int) -> bool:
        """One step of one request: `new` tokens at most; False where it finds no blocks."""
        request = self.requests[req_id]
        self.manager.new_step_starts()
        cached, hit = None, 0
        if request.num_computed_tokens == 0:
            cached, hit = self.manager.get_computed_blocks(request)[:2]
        new = min(new, request.num_tokens - request.num_computed_tokens - hit)
        if self.manager.allocate_slots(request, new, hit, cached) is None:
            return False
        before = request.num_computed_tokens + hit
        request.num_computed_tokens = before + new
        keys = SCHEME.keys(request.all_token_ids)
        for i, key in enumerate(keys):
            self.blocks_of[key] = request.block_hashes[: (i + 1) * PER]
            self.parent_of[key] = keys[i - 1] if i else b""
        blocks = self.manager.get_block_ids(req_id)[0]
        self.device.step([Scheduled(req_id, request.all_token_ids, before, new, blocks)], lambda _: keys)
        return True

    def end(self, req_id: str) -> None:
        self.manager.free(self.requests.pop(req_id))
        self.device.end(req_id)

    def preempt(self, req_id: str) -> None:
        self.manager.free(self.requests[req_id])
        self.requests[req_id].num_computed_tokens = 0
        self.device.end(req_id)  # as the scheduler says when it resumes

    def publish(self) -> list[Entry]:
        entries = self.device.merge([], lambda key: 0)
        for entry in entries:
            self.published[entry.key] = entry.bits
        return entries

    def hits(self, tokens: list[int]) -> int:
        """Chunks vLLM itself would find for this prompt."""
        request = Request("?", list(tokens), SamplingParams(max_tokens=1), None, block_hasher=self._hasher)
        return int(self.manager.get_computed_blocks(request)[1]) // CHUNK

    def told(self) -> set[bytes]:
        return {key for key, bits in self.published.items() if bits}

    def check(self) -> None:
        """Nothing published that is gone, to the block; nothing without the chunk before it."""
        told = self.told()
        for key in told:
            assert all(self.pool.get_cached_block(digest, [0]) for digest in self.blocks_of[key]), "gone"
            assert self.parent_of[key] in told or not self.parent_of[key], "a gap"
        assert told == {entry.key for entry in self.device.inventory([])}


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_a_chunk_is_published_when_vllm_has_cached_its_last_block(engine):
    engine.add("a", PROMPT)
    engine.run("a", CHUNK + 5)
    assert engine.publish() == [Entry(KEYS[0], KEYS[0], DEVICE)]
    engine.run("a", 1000)
    assert engine.publish() == [Entry(KEYS[0], key, DEVICE) for key in KEYS[1:]]
    engine.end("a")
    assert engine.publish() == []  # it stays in vLLM's cache
    assert engine.hits(PROMPT) == 3


def test_decode_steps_publish_nothing(engine):
    request = engine.add("a", PROMPT)
    engine.run("a", 1000)
    engine.publish()
    request.append_output_token_ids(7)
    engine.run("a", 1)
    assert engine.publish() == []
    assert not engine.device.stirred


def test_eviction_withdraws_a_prompt_from_its_end(engine):
    engine.add("a", PROMPT)
    engine.run("a", 1000)
    engine.end("a")
    engine.publish()
    other = [token + 5000 for token in PROMPT]
    engine.add("b", other + list(range(9000, 9000 + 5 * CHUNK)))  # 40 blocks less 33: five of a's go
    engine.run("b", 1000)
    gone = [entry.key for entry in engine.publish() if not entry.bits]
    assert gone
    assert gone == KEYS[-len(gone) :] or set(gone) == set(KEYS[-len(gone) :])
    engine.check()
    assert engine.hits(PROMPT) == 3 - len(gone)


def test_a_reset_withdraws_everything_at_once(engine):
    engine.add("a", PROMPT)
    engine.run("a", 1000)
    engine.end("a")
    engine.publish()
    assert engine.manager.reset_prefix_cache()
    assert engine.device.stirred  # a step is asked for
    assert {(e.key, e.bits) for e in engine.publish()} == {(key, 0) for key in KEYS}
    assert not engine.device.stirred


def test_a_cleared_map_forgets_names_not_blocks(engine):
    engine.add("a", PROMPT)
    engine.run("a", 1000)
    engine.end("a")
    engine.publish()
    engine.device.clear()
    assert {e.bits for e in engine.publish()} == {0}
    engine.add("b", PROMPT)
    engine.run("b", 1000)
    engine.publish()
    assert engine.told() == set(KEYS)
    engine.check()


def test_watching_changes_neither_reference_counts_nor_the_order_of_eviction():
    watched, plain = Engine(), Engine()
    plain.device.step = lambda *args: None
    for engine in (watched, plain):
        for name, shift in (("a", 0), ("b", 5000)):
            engine.add(name, [token + shift for token in PROMPT])
            engine.run(name, 1000)
        engine.end("a")
        engine.end("b")
    order = [
        [block.block_id for block in engine.pool.free_block_queue.get_all_free_blocks()]
        for engine in (watched, plain)
    ]
    assert order[0] == order[1]
    assert {b.ref_cnt for b in watched.pool.blocks if not b.is_null} == {0}


def test_a_chunk_held_by_both_carries_both_bits(engine):
    engine.add("a", PROMPT)
    engine.run("a", 1000)
    held = {KEYS[0]: HOST, KEYS[1]: HOST}
    changes = [Entry(KEYS[0], key, bits) for key, bits in held.items()]
    entries = engine.device.merge(changes, lambda key: held.get(key, 0))
    assert entries == [
        Entry(KEYS[0], KEYS[0], HOST | DEVICE),
        Entry(KEYS[0], KEYS[1], HOST | DEVICE),
        Entry(KEYS[0], KEYS[2], DEVICE),
    ]
    assert engine.device.inventory(changes) == entries
    # the host tier drops one that vLLM still has
    assert engine.device.merge([Entry(KEYS[0], KEYS[1], 0)], lambda key: 0) == [
        Entry(KEYS[0], KEYS[1], DEVICE)
    ]


def test_a_chunk_vllm_did_not_cache_is_not_claimed():
    engine = Engine(caching=False)
    engine.add("a", PROMPT)
    engine.run("a", 1000)
    assert engine.publish() == []


@pytest.mark.parametrize("seed", range(12))
def test_random_walks_never_publish_what_is_gone(seed):
    """Shared prefixes, duplicates computed side by side, preemption, resets, more prompts than blocks."""
    rng, engine = random.Random(seed), Engine()
    stems = [[rng.randrange(100, 9000) for _ in range(CHUNK * 3)] for _ in range(3)]
    for n in range(400):
        live = list(engine.requests)
        verb = rng.random()
        if verb < 0.25 and len(live) < 4:
            stem = rng.choice(stems)[: rng.randrange(1, 3 * CHUNK)]
            tail = [rng.randrange(100, 9000) for _ in range(rng.randrange(0, CHUNK))]
            engine.add(f"r{n}", stem + tail)
        elif verb < 0.75 and live:
            req_id = rng.choice(live)
            request = engine.requests[req_id]
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(rng.randrange(100, 9000))
            if not engine.run(req_id, rng.choice((1, 17, 64, 200))):
                engine.preempt(rng.choice(live))
        elif verb < 0.95 and live:
            engine.end(rng.choice(live))
        elif not live:
            engine.manager.reset_prefix_cache()
        engine.publish()
        engine.check()
