"""The scheduler's half with vLLM's own requests: whom it refuses, and what a reset promises."""

import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, SchedulerOutput
from vllm.v1.request import Request

from cacheengine.arena import Arena
from cacheengine.config import CacheConfig
from cacheengine.connectors.scheduler import SchedulerHalf
from cacheengine.connectors.wire import RankWords
from cacheengine.index_writer import WriterStats
from cacheengine.layout import KVLayout
from cacheengine.metrics import INDEX_COUNTS, KINDS
from cacheengine.plan import NO_PARENT
from cacheengine.tier import Ref
from cacheengine.tiers.disk import DiskTier

CHUNK, BLOCK = 64, 16
PROMPT = list(range(1000, 1000 + 3 * CHUNK + 10))


LAYOUT = KVLayout(2, BLOCK, 4096, CHUNK, "float32", "LBHNC/vec", {"weights": "w"})
DISK_BYTES = 1 << 20


def half(tmp_path, ranks: int = 1) -> SchedulerHalf:
    vllm = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="smol", model="/models/smol"),
        parallel_config=SimpleNamespace(world_size=ranks),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
    )
    config = CacheConfig(
        chunk_tokens=CHUNK, host_bytes=1 << 20, disk_path=str(tmp_path / "disk"), disk_bytes=DISK_BYTES
    )
    return SchedulerHalf(vllm, LAYOUT, config)


def request(req_id: str, tokens=PROMPT, **fields) -> Request:
    sampling = SamplingParams(max_tokens=4)
    return Request(
        req_id, None if fields.get("prompt_embeds") is not None else tokens, sampling, None, **fields
    )


def step(half: SchedulerHalf, req: Request, new: int):
    """One request's step, as vLLM's scheduler describes it; every leg of its plans is reported well."""
    blocks = list(range(1, 1 + -(-len(PROMPT) // BLOCK)))
    output = SchedulerOutput.make_empty()
    cached = CachedRequestData.make_empty()
    cached.req_ids, cached.num_computed_tokens = [req.request_id], [req.num_computed_tokens]
    output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = {req.request_id: new}
    output.kv_connector_block_state = KVConnectorBlockState({req.request_id}, lambda _: (blocks,), {})
    plans = half.plans(output).plans
    req.num_computed_tokens += new
    settle(half, [plan for plan in plans if plan.kind == "demote"])
    return [plan for plan in plans if plan.kind != "demote"]


def settle(half: SchedulerHalf, plans) -> None:
    half.heard(RankWords({plan.id: (1, len(plan.moves)) for plan in plans}))


def serve(half: SchedulerHalf, req_id: str, **fields) -> None:
    req = request(req_id, **fields)
    half.begin(req)
    settle(half, step(half, req, len(PROMPT)))
    half.end(req_id)


def asked(half: SchedulerHalf, req_id: str, **fields) -> int | None:
    req = request(req_id, **fields)
    half.begin(req)
    return half.matched(req, 0)


IMAGE = MultiModalFeatureSpec(
    data=None, modality="image", identifier="1f", mm_position=PlaceholderRange(offset=3, length=9)
)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora_request": LoRARequest("fr", 1, "/adapters/fr")}, "LoRA"),
        ({"mm_features": [IMAGE]}, "multimodal"),
        ({"prompt_embeds": torch.zeros(len(PROMPT), 8)}, "embeddings"),
        ({"resumable": True}, "streaming-input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_token_ids_do_not_name_is_served_and_never_cached(tmp_path, caplog, fields, reason):
    engine = half(tmp_path)
    serve(engine, "warm")
    with caplog.at_level(logging.INFO, "cacheengine"):
        for n in range(3):
            req = request(f"r{n}", **fields)
            engine.begin(req)
            assert engine.matched(req, 0) == 0
            assert step(engine, req, len(PROMPT)) == []
            engine.end(req.request_id)
    said = [r.getMessage() for r in caplog.records if "not cached" in r.getMessage()]
    assert len(said) == 1, "once, not once a request"
    assert reason in said[0]
    engine.store.check()


def test_a_salt_names_chunks_of_its_own(tmp_path):
    engine = half(tmp_path)
    serve(engine, "a", cache_salt="acme")
    assert asked(engine, "b", cache_salt="acme") == 3 * CHUNK
    assert asked(engine, "c") == 0
    assert asked(engine, "d", cache_salt="other") == 0


def test_after_a_reset_no_name_is_found_again_not_even_on_disk(tmp_path):
    engine = half(tmp_path)
    serve(engine, "a")
    serve(engine, "b", cache_salt="acme")
    assert engine.clear() is True
    assert asked(engine, "c") == 0
    assert asked(engine, "d", cache_salt="acme") == 0
    serve(engine, "e")
    assert asked(engine, "f") == 3 * CHUNK  # and the cache goes on
    engine.store.check()


def test_a_reset_keeps_its_promise_while_plans_are_under_way(tmp_path):
    engine = half(tmp_path)
    req = request("a")
    engine.begin(req)
    plans = step(engine, req, len(PROMPT))
    assert engine.clear() is True
    settle(engine, plans)  # the ranks report chunks of the old weights
    assert asked(engine, "b") == 0
    engine.store.check()


def test_a_request_that_runs_through_a_reset_is_not_saved_under_any_name(tmp_path):
    """Half a chunk was made by the old weights, the rest by the new."""
    engine = half(tmp_path)
    req = request("a")
    engine.begin(req)
    assert step(engine, req, CHUNK // 2) == []
    engine.clear()
    assert step(engine, req, 2 * CHUNK) == []
    assert engine.matched(req, 0) == 0
    engine.end("a")
    assert asked(engine, "b") == 0


def test_a_reset_leaves_alone_what_is_still_to_be_emptied(tmp_path):
    """A wish to clear zeroes headers outside the lock; its slots must not be given away meanwhile."""
    engine = half(tmp_path)
    serve(engine, "a")
    for _ in range(4):  # idle steps write to the disk
        settle(engine, engine.plans(SchedulerOutput.make_empty()).plans)
    wished = engine.store.clear()
    assert len(wished) == 3
    engine.clear()
    assert sorted(engine.store.to_erase()) == sorted(wished)


def test_a_reset_without_an_index_costs_no_disk_slot(tmp_path):
    """Nobody beats there, so nobody would ever empty a slot that was kept back."""
    engine = half(tmp_path)
    for n in range(3):
        req = request(f"r{n}")
        engine.begin(req)
        settle(engine, step(engine, req, len(PROMPT)))
        engine.end(req.request_id)
        writing = engine.plans(SchedulerOutput.make_empty()).plans
        assert [plan.kind for plan in writing] == ["demote"]
        engine.clear()
        settle(engine, writing)
    assert engine.store.to_erase() == []
    engine.store.check()


def test_two_resets_are_two_generations(tmp_path):
    engine = half(tmp_path)
    engine.clear()
    serve(engine, "a")
    assert asked(engine, "b") == 3 * CHUNK
    engine.clear()
    assert asked(engine, "c") == 0


def put(folder, rank: int, chunks: int) -> None:
    """What one of two ranks left on disk: the first chunks of the prompt, each in its slot."""
    keys = LAYOUT.scheme.keys(PROMPT)
    tier = DiskTier(
        [folder], DISK_BYTES, LAYOUT.payload_bytes, LAYOUT.scheme.namespace, CHUNK, rank, 2
    )  # fmt: skip
    arena = Arena(1, LAYOUT.payload_bytes)
    for slot, key in enumerate(keys[:chunks]):
        parent = keys[slot - 1] if slot else NO_PARENT
        assert tier.write([Ref(key, slot, parent, keys[0])], [arena.view(0)]) == 1
    tier.close()
    arena.close()


@pytest.mark.parametrize(("first", "second", "usable"), [(3, 3, 3), (3, 1, 1), (0, 3, 0), (2, 3, 2)])
def test_after_a_restart_a_chunk_counts_when_every_rank_has_it(tmp_path, first, second, usable):
    put(tmp_path / "disk", 0, first)
    put(tmp_path / "disk", 1, second)
    assert asked(half(tmp_path, ranks=2), "a") == usable * CHUNK


def test_a_slot_file_without_its_twin_holds_nothing(tmp_path):
    put(tmp_path / "disk", 0, 3)
    assert asked(half(tmp_path, ranks=2), "a") == 0


def test_a_chunk_is_held_when_the_last_of_the_ranks_has_spoken(tmp_path):
    engine = half(tmp_path, ranks=2)
    req = request("a")
    engine.begin(req)
    (plan,) = step(engine, req, len(PROMPT))
    engine.heard(RankWords({plan.id: (1, 4)}))
    assert engine.store.fill()["host"][0] == 0
    engine.heard(RankWords({plan.id: (1, 2)}))
    assert asked(engine, "b") == 2 * CHUNK  # the least of their words


def test_what_the_index_writer_went_through_is_counted_once(tmp_path):
    engine = half(tmp_path)
    engine._index = SimpleNamespace(stats=WriterStats(written=7, announcements=1), publish=lambda _: None)
    assert {name for name, _ in engine.stats().values()} >= {"cairn_engine_index_written_total"}
    engine._index.stats.mended = 2
    counted = {name: value for (name, _), value in engine.stats().values().items()}
    assert counted["cairn_engine_index_mended_total"] == 2
    assert "cairn_engine_index_written_total" not in counted


@pytest.mark.parametrize("what", INDEX_COUNTS)
def test_every_count_of_the_index_is_one_the_writer_keeps_and_a_metric(what):
    assert getattr(WriterStats(), what) == 0
    assert KINDS[f"cairn_engine_index_{what}_total"] == "counter"
