"""The connector under vLLM's real scheduler: whatever it does to a request, the tokens are right.

Answers are compared with a recurrence computed from no cache (engine.py); what was hit is proved by counters.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cacheengine.index_schema import DEVICE, HOST, chunk_name
from tests.cacheengine.connectors.engine import BLOCK, CHUNK, Engine, truth

Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """Engines on one folder; whatever happened to them, their books must be in order at the end."""
    engines: list[Engine] = []

    def launch(**fields: object) -> Engine:
        engines.append(Engine(tmp_path, **fields))
        return engines[-1]

    yield launch
    for engine in engines:
        engine.stop()


def tokens(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(length)]


def hits(engine: Engine, tier: str) -> float:
    return engine.half.planner.totals()[f"hit_tokens_{tier}"]


def forget_device(engine: Engine) -> None:
    assert engine.scheduler.reset_prefix_cache()


PROMPT = tokens(0, 5 * CHUNK + 2 * BLOCK + 3)
ANSWER = truth(PROMPT, 8)
LOADABLE = len(PROMPT) // BLOCK * BLOCK


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("caching", [True, False], ids=["device cache", "no device cache"])
def test_cold_and_from_the_host_the_same_tokens(start, ranks, caching):
    engine = start(ranks=ranks, caching=caching)
    assert engine.ask(PROMPT) == ANSWER
    if caching:
        forget_device(engine)
    assert engine.ask(PROMPT) == ANSWER
    assert hits(engine, "host") == LOADABLE


def test_what_the_device_held_is_said_beside_what_the_tiers_brought(start):
    engine = start()
    for _ in range(3):
        assert engine.ask(PROMPT) == ANSWER
    assert (hits(engine, "device"), hits(engine, "host")) == (2 * LOADABLE, 0)
    forget_device(engine)
    assert engine.ask(PROMPT[:CHUNK] + PROMPT[:CHUNK], 1) == truth(PROMPT[:CHUNK] * 2, 1)
    assert engine.ask(PROMPT) == ANSWER
    assert (hits(engine, "device"), hits(engine, "host")) == (2 * LOADABLE + CHUNK, LOADABLE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_disk_after_a_restart_the_same_tokens(start, tmp_path, ranks):
    disk = {"disk_path": str(tmp_path / "disk"), "disk_bytes": 8 << 20, "ranks": ranks}
    engine = start(**disk)
    assert engine.ask(PROMPT) == ANSWER
    engine.stop()
    again = start(**disk)
    assert again.ask(PROMPT) == ANSWER
    assert hits(again, "disk") > 0.7 * LOADABLE


def harm(path: Path, rng: random.Random) -> None:
    """One bit in the payload of every slot."""
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data) - 8192, 4096):
        if data[at : at + 4] == b"CRNF":
            data[at + 4096 + rng.randrange(4000)] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_of_two_ranks_lost_nobody_has(start, tmp_path, rank):
    disk = {"disk_path": str(tmp_path / "disk"), "disk_bytes": 8 << 20, "ranks": 2}
    engine = start(**disk)
    assert engine.ask(PROMPT) == ANSWER
    engine.stop()
    (path,) = (tmp_path / "disk").rglob(f"rank{rank}.slots")
    harm(path, random.Random(rank))
    again = start(**disk)
    assert again.ask(PROMPT) == ANSWER
    assert hits(again, "disk") == 0
    assert again.ranks[rank]._rank._stats["disk"].bad_frames > 0


def test_preempted_requests_answer_as_if_alone(start):
    engine = start(blocks=60, caching=False)
    asked = {f"r{n}": tokens(10 + n, 150) for n in range(6)}
    for n, (req_id, prompt) in enumerate(asked.items()):
        engine.add(req_id, prompt, 60 + n)
    engine.run()
    assert engine.resumed > 0
    assert hits(engine, "host") > 0  # what comes back loads what it had saved
    for n, (req_id, prompt) in enumerate(asked.items()):
        assert engine.answers[req_id] == truth(prompt, 60 + n)


def test_a_later_request_of_higher_priority_changes_nobody_s_tokens(start):
    engine = start(blocks=40, policy="priority")
    engine.add("low", tokens(20, 300), 80, priority=5)
    for _ in range(6):
        engine.step()
    engine.add("high", tokens(21, 300), 80, priority=-5)
    engine.run()
    assert engine.resumed > 0
    assert engine.answers["low"] == truth(tokens(20, 300), 80)
    assert engine.answers["high"] == truth(tokens(21, 300), 80)


@pytest.mark.parametrize("steps", range(1, 9))
def test_an_abort_at_any_step_of_a_prefill_leaves_nothing_wrong(start, steps):
    engine = start(budget=64)
    engine.add("gone", PROMPT)
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    engine.run()
    engine.check()
    forget_device(engine)
    assert engine.ask(PROMPT) == ANSWER


@pytest.mark.parametrize("steps", range(4))
def test_an_abort_at_any_step_of_a_load_leaves_nothing_wrong(start, steps):
    engine = start()
    engine.ask(PROMPT)
    forget_device(engine)
    engine.add("gone", PROMPT)
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    engine.run()
    engine.check()
    assert engine.ask(PROMPT) == ANSWER


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 192])
def test_prompts_of_every_length_cold_and_warm(start, length):
    engine, prompt = start(), tokens(length, length)
    for _ in range(3):
        assert engine.ask(prompt) == truth(prompt, 8)
        forget_device(engine)
    assert hits(engine, "host") == 2 * ((length - 1) // BLOCK * BLOCK)


def test_prompt_logprobs_are_computed_not_loaded(start):
    """vLLM asks us and ignores the answer: a loaded prefix has no logits."""
    engine = start()
    engine.ask(PROMPT)
    forget_device(engine)
    assert engine.ask(PROMPT, sampling={"prompt_logprobs": 1}) == ANSWER
    assert hits(engine, "host") == 0
    forget_device(engine)
    assert engine.ask(PROMPT) == ANSWER
    assert hits(engine, "host") == LOADABLE


def test_a_salt_shares_with_itself_alone(start):
    engine = start()
    engine.ask(PROMPT, cache_salt="acme")
    for salt, share in (("acme", LOADABLE), ("other", 0), (None, 0)):
        forget_device(engine)
        before = hits(engine, "host")
        assert engine.ask(PROMPT, cache_salt=salt) == ANSWER
        assert hits(engine, "host") - before == share


# -- resets ---------------------------------------------------------------------------------------


def test_after_a_reset_nothing_stored_before_is_found(start, tmp_path):
    engine = start(disk_path=str(tmp_path / "disk"), disk_bytes=8 << 20)
    engine.ask(PROMPT)
    engine.ask(PROMPT, cache_salt="acme")
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    before = [hits(engine, tier) for tier in ("host", "disk")]
    assert engine.ask(PROMPT) == ANSWER
    assert engine.ask(PROMPT, cache_salt="acme") == ANSWER
    assert [hits(engine, tier) for tier in ("host", "disk")] == before
    forget_device(engine)
    assert engine.ask(PROMPT) == ANSWER
    assert hits(engine, "host") > before[0]


def test_after_a_reset_not_even_redis_is_believed(start, valkey):
    """Others put chunks there, and so did we: under names that this process no longer says."""
    engine = start(redis_url=valkey.unix_url, redis_timeout_ms=20_000)
    assert engine.ask(PROMPT) == ANSWER
    with valkey.client() as client:
        assert client.keys("*_bytes")
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.ask(PROMPT) == ANSWER
    assert hits(engine, "redis") == 0
    again = start(redis_url=valkey.unix_url, redis_timeout_ms=20_000)  # the same weights, read anew
    assert again.ask(PROMPT) == ANSWER
    assert hits(again, "redis") > 0.7 * LOADABLE


def test_new_weights_never_meet_old_pages(start, monkeypatch):
    """The weights change under requests that wait and run: vLLM preempts, resets, goes on."""
    engine = start(budget=64)
    other = tokens(77, 300)
    engine.ask(other)
    engine.add("running", PROMPT)
    for _ in range(4):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    old = truth(PROMPT, 8), truth(other, 8)
    monkeypatch.setattr(
        "tests.cacheengine.connectors.engine.after", lambda s, t: (s * 17 + t + 3) % 16_777_213
    )
    fresh, renewed = truth(PROMPT, 8), truth(other, 8)
    assert (fresh, renewed) != old
    engine.run()
    assert engine.answers["running"] == fresh
    assert engine.ask(other) == renewed
    forget_device(engine)
    assert engine.ask(other) == renewed
    assert engine.ask(PROMPT) == fresh


# -- the device tier in the index -----------------------------------------------------------------


def published(engine: Engine, valkey, prompt: list[int]) -> list[int]:
    """What the index says of the prompt's full chunks, once the writer has said everything."""
    index, scheme = engine.half._index, engine.half._layout.scheme
    keys = scheme.keys(prompt)
    for _ in range(500):
        with index._changed:
            if not index._pending and not index._dirty and index.epoch:
                break
        index._thread.join(0.01)
    index._thread.join(0.05)  # what it took from the queue it has written
    with valkey.client() as client:
        names = [chunk_name(scheme.namespace, keys[0], key) for key in keys]
        return [int(client.hget(name, f"w@{index.epoch}") or 0) for name in names]


def test_the_device_tier_is_published_and_withdrawn_as_vllm_evicts(start, valkey):
    url = {"redis_url": valkey.unix_url, "worker_id": "w", "worker_url": "http://127.0.0.1:1"}
    engine = start(blocks=40, **url)
    engine.ask(PROMPT)
    assert all(bits & DEVICE and bits & HOST for bits in published(engine, valkey, PROMPT))
    seen = set()
    for n in range(12):
        engine.ask(tokens(500 + n, 3 * BLOCK), 2)
        held = [bool(bits & DEVICE) for bits in published(engine, valkey, PROMPT)]
        assert held == sorted(held, reverse=True)
        seen.add(sum(held))
    assert {5, 0} <= seen
    assert len(seen) > 3  # it went chunk by chunk
    assert engine.ask(PROMPT) == ANSWER
    assert all(bits & DEVICE for bits in published(engine, valkey, PROMPT))
    forget_device(engine)
    assert engine.scheduler.has_requests()  # one step is asked for
    engine.run()
    assert not any(bits & DEVICE for bits in published(engine, valkey, PROMPT))
    assert all(bits & HOST for bits in published(engine, valkey, PROMPT))


# -- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("caching", [True, False], ids=["device cache", "no device cache"])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_is_always_right(start, tmp_path, seed, caching, ranks):
    rng = random.Random(seed)
    engine = start(
        blocks=rng.choice((50, 120)), budget=rng.choice((48, 160)), caching=caching, ranks=ranks,
        disk_path=str(tmp_path / "disk"), disk_bytes=1 << 20, host_bytes=(256 << 10) * rng.choice((2, 8)),
        verify_loads=True,
    )  # fmt: skip
    stems = [tokens(1000 * seed + n, 4 * CHUNK) for n in range(3)]
    expected: dict[str, list[int]] = {}
    gone: set[str] = set()
    for n in range(60):
        stem = rng.choice(stems)[: rng.randrange(1, 4 * CHUNK)]
        prompt, length = stem + tokens(n, rng.randrange(40)), rng.randrange(1, 40)
        engine.add(f"r{n}", prompt, length)
        expected[f"r{n}"] = truth(prompt, length)
        for _ in range(rng.randrange(12)):
            engine.step()
        if rng.random() < 0.2:
            engine.abort(req_id := f"r{rng.randrange(n + 1)}")
            gone.add(req_id)
        if rng.random() < 0.05:
            engine.scheduler.reset_prefix_cache(reset_connector=rng.random() < 0.5)
    engine.run()
    for req_id, answer in expected.items():
        got = engine.answers[req_id]
        assert got == (answer[: len(got)] if req_id in gone else answer)
    assert caching or hits(engine, "host") > 0
