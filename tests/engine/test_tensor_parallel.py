"""Two ranks, one map: the first law holds under tensor parallelism, from every tier.

A small random model (tests/engine/tiny.py), float32, one core a rank.  What one rank lost, nobody has.
"""

import random
from dataclasses import dataclass, field

import pytest
import redis

from cacheengine.keys import KeyScheme, Namespace
from tests.engine.rig import Worker

CHUNK, BLOCK = 256, 128
TWO = ("--dtype", "float32", "--tensor-parallel-size", "2", "--no-enable-prefix-caching")
LENGTHS = (40, 255, 257, 300, 513, 777, 1024, 1300)
CACHE = {"host_bytes": 64 << 20, "verify_loads": True, "redis_timeout_ms": 60_000}
DISK_BYTES = 128 << 20
HALVED = LENGTHS.index(1024)  # the prompt whose third chunk one rank loses in Redis
Answers = list[list[int]]


def prompts() -> list[list[int]]:
    """Different texts, and one that continues another."""
    rng = random.Random(7)
    made = [[rng.randrange(100, 40_000) for _ in range(length)] for length in LENGTHS]
    return [*made, made[-1] + [rng.randrange(100, 40_000) for _ in range(400)]]


def loadable(asked: list[list[int]]) -> int:
    return sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in asked)


@dataclass
class Story:
    reference: Answers = field(default_factory=list)
    passes: dict[str, Answers] = field(default_factory=dict)
    hits: dict[str, dict[str, float]] = field(default_factory=dict)
    verify_failures: float = 0
    twin: Answers = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    saved: float = 0
    bad_frames: float = 0

    def run(self, name: str, worker: Worker, asked: list[list[int]]) -> None:
        before = {tier: worker.hits(tier) for tier in ("host", "disk", "redis")}
        self.passes[name] = [worker.complete(prompt, 32) for prompt in asked]
        self.hits[name] = {tier: worker.hits(tier) - n for tier, n in before.items()}
        self.verify_failures += worker.metric("cairn_engine_verify_failures_total")


def scheme_of(client: redis.Redis, worker_id: str) -> KeyScheme:
    """How a worker names its chunks, as it says in the index."""
    (lease,) = client.keys(f"cairn:*:worker:{worker_id}")
    return KeyScheme(Namespace(bytes.fromhex(client.hget(lease, "namespace").decode())), CHUNK)


@pytest.fixture(scope="module")
def story(start, tiny, valkey_module, tmp_path_factory) -> Story:
    told, asked, folder = Story(), prompts(), tmp_path_factory.mktemp("disk")
    two = {"weights": tiny, "core": "0|1", "args": TWO}
    disk = {**CACHE, "disk_path": str(folder), "disk_bytes": DISK_BYTES, "worker_id": "first"}
    url = valkey_module.unix_url

    plain = start("plain", None, **two).ready()  # one at a time: ranks spin while they wait for each other
    told.reference = [plain.complete(prompt, 32) for prompt in asked]
    told.twin = [plain.complete([t + 1 for t in prompt[:CHUNK]] + prompt[CHUNK:], 32) for prompt in asked[2:]]
    plain.kill()

    first = start("first", disk, redis_url=url, **two).ready()
    told.run("cold", first, asked)
    told.saved = first.metric("cairn_engine_saved_chunks_total", tier="host")
    for tier in ("disk", "redis"):
        first.settled(tier, int(told.saved))
    told.run("host", first, asked)
    told.used = {tier: first.metric("cairn_engine_used_chunks", tier=tier) for tier in ("host", "disk")}
    with valkey_module.client() as client:
        scheme = scheme_of(client, "first")
    first.kill()

    again = start("again", disk, **two).ready()
    told.run("disk after kill -9", again, asked[:6])
    _harm_rank_one(folder)
    told.run("disk, one rank harmed", again, asked[6:])
    told.bad_frames = again.metric("cairn_engine_bad_frames_total", tier="disk")
    again.kill()

    other = start("other", {**CACHE, "worker_id": "other"}, redis_url=url, **two).ready()
    with valkey_module.client() as client:
        lost = scheme.keys(asked[HALVED])[2].hex()
        (half,) = client.keys(f"*@2@1@{lost}_bytes")
        client.delete(half)
    told.run("redis, half a chunk lost", other, [asked[HALVED]])
    told.run("redis on the other worker", other, asked[:HALVED] + asked[HALVED + 1 :])
    other.kill()
    told.logs = {worker.log.stem: worker.log.read_text() for worker in (first, again, other)}
    return told


def _harm_rank_one(folder) -> None:
    """One bit in the payload of every slot of one rank."""
    with (folder / "rank1.slots").open("r+b") as f:
        data = f.read()
        at = data.find(b"CRNF")
        while at >= 0:
            if at % 4096 == 0:
                f.seek(at + 4096 + 1000)
                f.write(bytes([data[at + 5096] ^ 4]))
            at = data.find(b"CRNF", at + 1)


def test_the_model_reads_its_whole_prompt(story):
    """Else equal answers would prove nothing: another first chunk is another answer."""
    assert all(twin != answer for twin, answer in zip(story.twin, story.reference[2:], strict=True))
    assert len({tuple(answer) for answer in story.reference}) == len(story.reference)


@pytest.mark.parametrize(
    ("name", "tier", "left_out"),
    [
        ("cold", None, set()),
        ("host", "host", set()),
        ("disk after kill -9", "disk", set(range(6, 9))),
        ("redis on the other worker", "redis", {HALVED}),
    ],
)
def test_two_ranks_answer_as_without_a_cache(story, name, tier, left_out):
    asked = [i for i in range(len(LENGTHS) + 1) if i not in left_out]
    assert story.passes[name] == [story.reference[i] for i in asked]
    if tier:
        # what two prompts share comes from below once, then from host
        given = story.hits[name][tier] + story.hits[name]["host"] * (tier != "host")
        assert given == loadable([prompts()[i] for i in asked]), story.hits[name]
        assert story.hits[name][tier] > 0


def test_what_one_rank_lost_on_disk_is_a_counted_miss_for_both(story):
    assert story.passes["disk, one rank harmed"] == story.reference[6:]
    assert story.hits["disk, one rank harmed"]["disk"] == 0
    assert story.bad_frames > 0


def test_half_a_chunk_in_redis_ends_the_prefix_there(story):
    assert story.passes["redis, half a chunk lost"] == [story.reference[HALVED]]
    assert story.hits["redis, half a chunk lost"]["redis"] == 2 * CHUNK


def test_chunks_are_counted_once_not_once_a_rank(story):
    assert 0 < story.used["host"] == story.used["disk"] == story.saved


def test_every_loaded_page_was_bit_equal(story):
    assert story.verify_failures == 0


def test_each_rank_says_which_it_is(story):
    assert "rank 0: 4 layers" in story.logs["first"]
    assert "rank 1: 4 layers" in story.logs["first"]
