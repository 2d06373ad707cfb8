"""Explaining, the closed loop and the shadow, over a fleet that hypothesis draws.

The index and Redis are stood in for at their seams: what they would answer is part of what is drawn.
"""

import asyncio
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheengine.errors import IndexDown
from cacheengine.index_schema import Depths, Lease, WorkerInfo
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of, probe_keys
from router.load import LoadBoard
from router.placement import Placement
from router.policy import POLICIES, replay
from router.registry import Registry
from router.router import Router

SCHEME = KeyScheme(namespace_of({"model": "m"}), 256)
TOKENS = 256 * 12 + 100
KEYS = SCHEME.keys(range(TOKENS))
OTHER = SCHEME.keys(range(5, TOKENS))
PROBE = tuple(probe_keys(SCHEME))


class Told:
    """Index and fleet of a test: they answer what they were told to."""

    def __init__(self, held: Mapping[str, Depths], beats: Mapping[str, Mapping[str, str]]) -> None:
        self.held, self.beats, self.down, self.asked = held, beats, False, 0

    async def holders(self, namespace: bytes, keys: Sequence[ChunkKey]) -> dict[tuple[str, int], Depths]:
        self.asked += 1
        if self.down:
            raise IndexDown("away")
        return {(worker_id, 5): depths for worker_id, depths in self.held.items()}

    async def read(self) -> list[Lease]:
        return [Lease(info(worker_id), beat) for worker_id, beat in self.beats.items()]


def info(worker_id: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id,
        f"http://{worker_id}:1",
        "m",
        "/m",
        SCHEME.namespace.hex(),
        256,
        PROBE,
        block_size=128,
        payload_bytes=256 * 46_080,
        tiers=("device", "host", "disk", "redis"),
        boot_id="1",
        epoch=5,
    )


BEAT = {"prefill_rate": "10000", "bw_host": "4e9", "bw_disk": "2e9", "bw_redis": "1e9", "beat_ms": "1"}


class House:
    """A router over a drawn fleet, with a clock of its own."""

    def __init__(
        self,
        held: Mapping[str, Depths],
        beats: Mapping[str, Mapping[str, str]] | None = None,
        policy: str = "predicted_ttft",
        **more: Any,
    ) -> None:
        self.now = 0.0
        self.told = Told(held, beats or dict.fromkeys(held, BEAT))
        http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200)))
        fleet: Any = self.told
        self.registry = Registry(http, fleet, clock=lambda: self.now)
        self.board = LoadBoard()
        self.router = Router(self.registry, self.board, fleet, policy, clock=lambda: self.now, **more)
        asyncio.run(self.registry.refresh())

    def place(self, keys: list[ChunkKey] = KEYS, tokens: int = TOKENS) -> list[Placement]:
        return list(asyncio.run(self.router.place("m", keys, tokens, affinity=b"x")))

    def explain(self, keys: list[ChunkKey] = KEYS, tokens: int = TOKENS) -> dict[str, Any]:
        return asyncio.run(self.router.explain("m", keys, tokens, affinity=b"x"))

    def beat(self, queued_tokens: str) -> None:
        later = {"beat_ms": str(self.now + 10), "queued_tokens": queued_tokens}
        self.told.beats = {worker_id: {**beat, **later} for worker_id, beat in self.told.beats.items()}
        asyncio.run(self.registry.refresh())

    def answer(self, placement: Placement, cached: int) -> None:
        self.router.learn(placement, TOKENS, cached)
        self.now += 1


depths = st.builds(Depths, *[st.integers(0, 12)] * 4)
amounts = st.integers(0, 20_000).map(str)
beats = st.fixed_dictionaries(
    {
        "prefill_rate": amounts,
        "queued_tokens": amounts,
        "running": st.integers(0, 9).map(str),
        "bw_host": st.sampled_from(["0", "1e6", "4e9"]),
        "beat_ms": st.integers(0, 3).map(str),
        "redis_up": st.sampled_from(["0", "1"]),
    }
)
fleets = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(depths, beats), min_size=1)


@given(
    fleets,
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["", *sorted(POLICIES)]),
    st.lists(
        st.tuples(
            st.sampled_from([KEYS, OTHER, KEYS[:3], []]),
            st.sampled_from(["place", "hold", "answer", "fail", "beat"]),
            st.integers(0, 3000),
        ),
        max_size=8,
    ),
    st.integers(0, 3),
)
def test_explain_says_what_place_does_and_changes_nothing(
    fleet: dict[str, tuple[Depths, dict[str, str]]],
    policy: str,
    shadow: str,
    steps: list[tuple[list[ChunkKey], str, int]],
    times: int,
) -> None:
    def house() -> House:
        held = {worker_id: depths for worker_id, (depths, _) in fleet.items()}
        return House(held, {worker_id: beat for worker_id, (_, beat) in fleet.items()}, policy, shadow=shadow)

    asked, left_alone = house(), house()
    for keys, what, tokens in steps:
        for each in (asked, left_alone):
            each.told.down = what == "fail"
            if what == "beat":
                each.beat(str(tokens))
        for _ in range(times):
            asked.explain(keys)
        for each in (asked, left_alone):  # a ticket between the question and the decision
            each.board.start("a", tokens, 0)
        explained = [asked.explain(keys) for _ in range(times)]
        first, twin = (each.place(keys) for each in (asked, left_alone))
        assert first == twin  # whoever was asked before decides as if he was not
        for said in explained:
            assert said["order"] == [placement.worker.id for placement in first]
            assert said["workers"][0]["terms_ms"] == first[0].terms_ms
            assert said["workers"][0]["reason"] == first[0].reason
            assert {row["worker"] for row in said["workers"]} == set(fleet)
            real = asked.router.decisions[-1]
            assert {k: v for k, v in said.items() if k not in ("at", "workers")} == {
                k: v for k, v in real.items() if k != "at"
            }
        for each, placements in ((asked, first), (left_alone, twin)):
            if what == "hold":
                each.board.start(placements[0].worker.id, TOKENS, placements[0].expected_hit_tokens)
            if what == "answer":
                each.answer(placements[0], tokens)
    assert list(map(timeless, asked.router.decisions)) == list(map(timeless, left_alone.router.decisions))
    for line in asked.router.decisions:
        assert replay(json.loads(json.dumps(dict(line)))) == line["order"]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "at": 0}


def test_an_answer_is_written_beside_its_prediction() -> None:
    house = House({"a": Depths(host=8)})
    first, second = house.place()[0], house.place(OTHER)[0]
    house.router.learn(first, TOKENS, 2048)
    assert [line["actual_hit_tokens"] for line in house.router.decisions] == [2048, None]
    house.router.decisions.clear()
    house.router.learn(second, TOKENS, 5)  # its line is gone; nothing to write on


def test_a_worker_that_never_has_what_the_index_says_stops_getting_its_traffic_and_recovers() -> None:
    house = House({"a": Depths(host=12), "b": Depths(), "c": Depths()})
    for _ in range(3):
        placement = house.place()[0]
        assert (placement.worker.id, placement.claimed.host) == ("a", 12 * 256)
        house.answer(placement, 0)
        house.now += 11  # what was sent is not remembered as under way
    placements = {placement.worker.id: placement for placement in house.place()}
    assert placements["a"].expected_hit_tokens == 0
    assert placements["a"].claimed.host == 12 * 256
    assert house.router.decisions[-1]["blind"] == "stale"
    explained = {row["worker"]: row for row in house.explain()["workers"]}
    assert explained["a"]["trust"]["local"]["state"] == "STALE"
    assert explained["a"]["claimed_by_index"]["host"] == 12 * 256
    for _ in range(30):  # probation: the index is right again, and is not believed before it is proved
        house.answer(placements["a"], 12 * 256)
    house.now += 11
    assert house.place()[0].expected_hit_tokens == 12 * 256
    assert house.router.decisions[-1]["blind"] == ""


def test_lost_blobs_do_not_cost_a_worker_its_own_hits() -> None:
    house = House({"a": Depths(host=4, shared=12)})
    for _ in range(3):
        house.answer(house.place()[0], 4 * 256)
        house.now += 11
    hit = house.place()[0].hit_by_tier
    assert (hit["host"], hit["shared"]) == (4 * 256, 0)


def test_what_is_slower_to_load_than_to_compute_is_not_held_against_a_worker() -> None:
    slow = {**BEAT, "bw_disk": "1e6"}
    house = House({"a": Depths(host=4, disk=12)}, {"a": slow})
    for _ in range(5):
        house.answer(house.place()[0], 4 * 256)
        house.now += 11
    assert house.explain()["workers"][0]["trust"]["local"] == {"state": "EXACT", "precision": 1.0}


def test_the_last_token_is_always_computed_and_nobody_is_blamed_for_it() -> None:
    house = House({"a": Depths(host=1)})
    for _ in range(5):
        placement = house.place(KEYS[:1], 256)[0]
        house.router.learn(placement, 256, 128)  # all whole blocks before the last token
        house.now += 11
    assert house.explain()["workers"][0]["trust"]["local"]["precision"] == 1.0


def test_a_worker_that_cannot_reach_redis_is_not_counted_on_for_what_lies_there() -> None:
    house = House({"a": Depths(shared=10), "b": Depths()}, {"a": BEAT, "b": {**BEAT, "redis_up": "0"}})
    shared = {placement.worker.id: placement.hit_by_tier["shared"] for placement in house.place()}
    assert shared == {"a": 10 * 256, "b": 0}


@pytest.mark.parametrize(
    ("change", "reason"), [("down", "index_down"), ("no keys", "no_keys"), ("no index", "no_index")]
)
def test_blind_decisions_say_why(change: str, reason: str) -> None:
    house = House({"a": Depths(), "b": Depths()})
    house.told.down = change == "down"
    if change == "no index":
        house.router._index = None
    house.place([] if change == "no keys" else KEYS)
    assert house.router.decisions[-1]["blind"] == reason


def test_a_new_worker_takes_new_prompts_as_its_share_rises_and_every_prompt_it_holds() -> None:
    house = House({"a": Depths(), "b": Depths()})
    told = house.told

    def firsts(policy: str) -> set[int]:
        """Which of 200 prompts `c` gets."""
        house.router.policy = policy
        prompts = [SCHEME.keys(range(i, i + 300)) for i in range(200)]
        return {i for i, keys in enumerate(prompts) if house.place(keys, 300)[0].worker.id == "c"}

    told.beats = {**told.beats, "c": BEAT}
    asyncio.run(house.registry.refresh())
    assert firsts("predicted_ttft") == set()
    taken = []
    for now in (10, 20, 40):
        house.now = now
        asyncio.run(house.registry.refresh())
        taken.append(firsts("predicted_ttft"))
    few, more, all_of_its_own = map(len, taken)
    assert 0 < few < more < all_of_its_own
    assert taken[0] < taken[1] < taken[2]  # what it got once stays with it
    told.beats = {**told.beats, "d": BEAT}
    told.held = {"d": Depths(host=1)}
    asyncio.run(house.registry.refresh())
    assert house.place(SCHEME.keys(range(9000, 9000 + TOKENS)))[0].worker.id == "d"
    for line in house.router.decisions:
        assert replay(json.loads(json.dumps(dict(line)))) == line["order"]


def test_a_fleet_of_new_workers_is_a_fleet() -> None:
    house = House({"a": Depths()})
    house.told.beats = {"b": BEAT, "c": BEAT}
    asyncio.run(house.registry.refresh())
    house.registry.mark_down("a")
    assert house.place()[0].worker.id in "bc"


def test_the_shadow_is_scored_and_not_obeyed() -> None:
    house = House({"a": Depths(), "b": Depths(), "c": Depths(device=12)}, policy="round_robin",
                  shadow="predicted_ttft")  # fmt: skip
    assert [house.place()[0].worker.id for _ in range(3)] == ["a", "b", "c"]
    assert house.told.asked == 3  # for the shadow's sake
    shadows = [copy.deepcopy(line["shadow"]) for line in house.router.decisions]
    assert shadows[0]["worker"] == "c"
    assert [shadow["differs"] for shadow in shadows] == [
        s["worker"] != w for s, w in zip(shadows, "abc", strict=True)
    ]
    assert shadows[0]["predicted_ms"] < house.router.decisions[0]["predicted_ms"]


def test_a_shadow_nobody_knows_is_refused() -> None:
    with pytest.raises(KeyError, match="wishful"):
        House({"a": Depths()}, shadow="wishful")


def test_a_stale_claim_of_an_earlier_process_is_not_held_against_the_next() -> None:
    house = House({"a": Depths(host=12)})
    for _ in range(3):
        house.answer(house.place()[0], 0)
    worker = house.place()[0].worker
    assert not house.router.trust.believes(worker, "local")
    assert house.router.trust.believes(replace(worker, boot_id="2"), "local")


@pytest.mark.parametrize("change", [{"id": "gone"}, {"boot_id": "another life"}])
def test_what_a_worker_that_left_still_says_is_not_remembered(change: dict[str, str]) -> None:
    house = House({"a": Depths(device=8)})
    placement = house.place()[0]
    left = placement._replace(worker=replace(placement.worker, **change))
    for _ in range(5):
        house.answer(left, 0)
    assert house.router.trust._rows == {}
    house.answer(placement, 0)
    assert house.router.trust._rows != {}


def test_the_log_of_decisions_is_bounded_by_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.router.MAX_CANDIDATES", 10)
    house = House(dict.fromkeys("abcd", Depths()))
    placements = [house.place()[0] for _ in range(5)]
    assert len(house.router.decisions) == 2
    house.answer(placements[-1], 7)
    assert [line["actual_hit_tokens"] for line in house.router.decisions] == [None, 7]
    house.answer(placements[0], 7)  # its line is gone
