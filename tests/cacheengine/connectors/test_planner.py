"""Tokens and block tables in, plans out: driven as vLLM's scheduler drives it, without vLLM."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cacheengine.connectors.demoter import DECODE_SECONDS, Demoter
from cacheengine.connectors.planner import GRACE_SECONDS, Geometry, Planner, Scheduled
from cacheengine.keys import KeyScheme, Namespace
from cacheengine.metrics import Tally
from cacheengine.plan import DISK, HOST, REDIS, SKIP
from cacheengine.store import Store

CHUNK, BLOCK = 64, 16
SCHEME = KeyScheme(Namespace(b"n" * 16), CHUNK)
PROMPT = list(range(1000, 1000 + 4 * CHUNK + 10))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A planner with its seams in hand: the probe's answers, the clock, the ranks."""

    def __init__(
        self,
        ranks: int = 1,
        write: str = "behind",
        loading: str = "quicker",
        **slots: int,
    ) -> None:
        self.asked, self.answers, self.clock, self.tally = [], [], Clock(), Tally()
        self.store = Store(slots or {HOST: 16}, CHUNK // BLOCK, clock=self.clock)
        geometry = Geometry(CHUNK, CHUNK * 100, BLOCK, ranks)
        demoter = Demoter(self.store, write, 16, self.clock)
        self.planner = Planner(
            SCHEME, geometry, self.store, demoter, self.probe, 1.0, self.tally, self.clock, loading
        )
        self.ranks, self.blocks = ranks, 0

    def probe(self, keys):
        if REDIS not in self.store.fill():
            return None
        self.asked.append(len(keys))
        self.answers.append(Future())
        return self.answers[-1]

    def table(self, tokens: int) -> list[int]:
        self.blocks += 100
        return list(range(self.blocks, self.blocks + -(-tokens // BLOCK)))

    def settle(self, plans, kept=None):
        for plan in plans:
            n = len(plan.moves) if kept is None else kept
            self.planner.report({plan.id: (self.ranks, n)})

    def idle(self):
        """Steps with nothing scheduled until nothing is left to write; what was written, chunk by chunk."""
        written = []
        while plans := self.planner.step([]):
            self.settle(plans)
            written += [(move.tier, move.key) for plan in plans for move in plan.moves]
        return written

    def serve(self, req_id, tokens, computed=0):
        """A whole prompt in one step; its plans."""
        blocks = self.table(len(tokens))
        return self.planner.step([Scheduled(req_id, tokens, computed, len(tokens) - computed, blocks)])

    def warm(self, tokens=PROMPT, req_id="warm"):
        self.planner.begin(req_id, tokens, [])
        self.settle(self.serve(req_id, tokens))
        self.planner.end(req_id)
        self.idle()


def test_a_cold_prompt_saves_its_full_chunks_and_not_the_tail():
    rig = Rig()
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) == 0
    (plan,) = rig.serve("a", PROMPT)
    assert [m.key for m in plan.moves] == SCHEME.keys(PROMPT)
    assert plan.moves[1].blocks == (104, 105, 106, 107)


def test_a_repeat_loads_all_but_the_last_token_s_block():
    rig = Rig()
    rig.warm()
    rig.planner.begin("b", PROMPT[: 4 * CHUNK], [])
    assert rig.planner.matched("b", PROMPT[: 4 * CHUNK], 0) == 4 * CHUNK - BLOCK
    assert rig.planner.matched("b", PROMPT[: 4 * CHUNK], 0) == 4 * CHUNK - BLOCK  # asking changes nothing
    table = rig.table(4 * CHUNK)
    rig.planner.allocated("b", table, 4 * CHUNK - BLOCK)
    (plan,) = rig.planner.step([])
    assert plan.moves[3].blocks == (*table[12:15], SKIP)


def test_tokens_the_device_held_are_counted_once_however_often_the_engine_asks():
    rig = Rig()
    rig.planner.begin("a", PROMPT, [])
    for computed in (BLOCK, 2 * BLOCK, 2 * BLOCK):  # the last ask is the one that was granted
        rig.planner.matched("a", PROMPT, computed)
    assert rig.planner.totals()["hit_tokens_device"] == 0
    rig.serve("a", PROMPT, 2 * BLOCK)
    assert rig.planner.totals()["hit_tokens_device"] == 2 * BLOCK
    rig.planner.matched("a", PROMPT, CHUNK)  # it was preempted
    rig.serve("a", PROMPT, CHUNK)
    assert rig.planner.totals()["hit_tokens_device"] == 2 * BLOCK


TAILED = PROMPT[: CHUNK + 2 * BLOCK + 5]


def test_the_ragged_tail_of_a_prompt_is_kept_to_the_block():
    rig = Rig()
    rig.planner.begin("a", TAILED, [])
    (plan,) = rig.serve("a", TAILED)
    assert [(m.size, m.blocks) for m in plan.moves] == [(4, (100, 101, 102, 103)), (2, (104, 105))]
    rig.settle([plan])
    rig.planner.begin("b", TAILED, [])
    assert rig.planner.matched("b", TAILED, 0) == CHUNK + 2 * BLOCK
    rig.planner.allocated("b", table := rig.table(len(TAILED)), CHUNK + 2 * BLOCK)
    (plan,) = rig.planner.step([])
    assert [m.blocks for m in plan.moves] == [tuple(table[:4]), tuple(table[4:6])]
    rig.settle([plan])
    rig.store.check()


@pytest.mark.parametrize(
    ("length", "hit"), [(3 * BLOCK, 2), (3 * BLOCK + 1, 3), (2 * BLOCK, 0), (CHUNK + 9, 3)]
)
def test_a_prompt_shorter_than_a_chunk_profits_too(length, hit):
    """A tail serves whoever shares all of it; the last token's block is always computed."""
    rig = Rig()
    rig.warm(PROMPT[: 3 * BLOCK + 4])
    prompt = PROMPT[:length]
    rig.planner.begin("b", prompt, [])
    assert rig.planner.matched("b", prompt, 0) == hit * BLOCK


def test_of_several_tails_the_longest_that_fits_is_loaded():
    rig = Rig()
    for blocks in (1, 2, 3):
        rig.warm(PROMPT[: CHUNK + blocks * BLOCK + 1], f"warm{blocks}")
    rig.planner.begin("b", PROMPT[: 2 * CHUNK - 1], [])
    assert rig.planner.matched("b", PROMPT[: 2 * CHUNK - 1], 0) == CHUNK + 3 * BLOCK
    other = [*PROMPT[: CHUNK + BLOCK], *range(50)]
    rig.planner.begin("c", other, [])
    assert rig.planner.matched("c", other, 0) == CHUNK + BLOCK


def test_a_tail_that_the_device_holds_in_part_is_loaded_in_part():
    rig = Rig()
    rig.warm(TAILED)
    rig.planner.begin("b", TAILED, [])
    assert rig.planner.matched("b", TAILED, CHUNK + BLOCK) == BLOCK
    rig.planner.allocated("b", table := rig.table(len(TAILED)), BLOCK)
    (plan,) = rig.planner.step([])
    assert [(m.size, m.blocks) for m in plan.moves] == [(2, (SKIP, table[5]))]


def test_a_tail_in_redis_is_asked_for_with_the_rest():
    rig = Rig(host=16, redis=100)
    rig.planner.begin("a", TAILED, [])
    assert rig.asked == [2]
    rig.answers[0].set_result(2)
    assert rig.planner.matched("a", TAILED, 0) == CHUNK + 2 * BLOCK
    rig.planner.allocated("a", rig.table(len(TAILED)), CHUNK + 2 * BLOCK)
    (plan,) = rig.planner.step([])
    assert [(m.tier, m.size) for m in plan.moves] == [(REDIS, 4), (REDIS, 2)]
    rig.settle([plan])
    assert rig.store.fill()[HOST] == (2, 16)  # and both are here now
    rig.store.check()


def test_nothing_is_written_below_while_the_engine_runs_unless_it_was_used_again():
    rig = Rig(write="idle", host=16, disk=16)
    for name in "ab":
        rig.planner.begin(name, PROMPT, [])
        plans = rig.serve(name, PROMPT, 4 * CHUNK if name == "b" else 0)
        rig.settle(plans)
        assert [plan.kind for plan in plans] == (["save"] if name == "a" else ["demote"])
    assert rig.planner.busy is False


def test_beside_pure_decoding_a_chunk_a_second_is_written():
    rig = Rig(write="idle", host=16, disk=16)
    rig.planner.begin("a", PROMPT, [])
    rig.settle(rig.serve("a", PROMPT))
    decode = Scheduled("a", PROMPT, len(PROMPT), 1, rig.table(len(PROMPT) + 1))
    (plan,) = rig.planner.step([decode])
    assert [move.tier for move in plan.moves] == [DISK]
    rig.settle([plan])
    assert rig.planner.step([decode]) == []
    rig.clock.now += DECODE_SECONDS
    (plan,) = rig.planner.step([decode])
    rig.clock.now += DECODE_SECONDS
    assert rig.planner.step([decode]) == []  # the last one is still under way
    rig.settle([plan])
    assert len(rig.planner.step([decode])) == 1


def test_idle_moments_are_used_to_write_everything_from_the_front():
    rig = Rig(write="idle", host=16, disk=16)
    rig.planner.begin("a", PROMPT, [])
    rig.settle(rig.serve("a", PROMPT))
    assert rig.planner.busy
    assert rig.idle() == [(DISK, key) for key in SCHEME.keys(PROMPT)]
    assert not rig.planner.busy


def test_with_second_hit_a_prompt_seen_once_stays_in_memory():
    rig = Rig(write="second_hit", host=16, disk=16)
    rig.warm()
    assert rig.store.fill()[DISK] == (0, 16)
    rig.planner.begin("b", PROMPT, [])
    rig.settle(rig.serve("b", PROMPT, 4 * CHUNK))
    assert rig.store.fill()[DISK] == (4, 16)


def test_on_evict_waits_until_host_slots_run_out():
    rig = Rig(write="on_evict", host=9, disk=16)
    rig.warm()
    rig.warm([7] * 4 * CHUNK, "b")
    assert rig.store.fill()[DISK] == (0, 16)
    rig.warm([8] * CHUNK, "c")
    assert rig.store.fill()[DISK][0] > 0


def measured(rig: Rig, *bytes_per_second: int) -> None:
    """Computing was measured, and loading from the disk so often."""
    rig.planner.rates.observe_prefill(1000, 1.0)
    for speed in bytes_per_second:
        rig.planner.rates.observe_read(DISK, speed, 1.0)


@pytest.mark.parametrize(("bytes_per_second", "hit"), [(10**9, 4), (1000, 0)])
def test_what_is_quicker_computed_is_not_loaded(bytes_per_second, hit):
    rig = Rig(host=4, disk=16)
    rig.warm()
    rig.warm([7] * 4 * CHUNK, "other")  # the first prompt is only on the disk now
    measured(rig, *[bytes_per_second] * 3)
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) == hit * CHUNK
    rig.serve("a", PROMPT, hit * CHUNK)
    declined = rig.tally.take().get(("cairn_engine_declined_tokens_total", (DISK,)), 0)
    assert declined == (4 - hit) * CHUNK
    rig.clock.now = 61.0  # what was measured a minute ago is tried again
    rig.planner.begin("b", PROMPT, [])
    assert rig.planner.matched("b", PROMPT, 0) == 4 * CHUNK


@pytest.mark.parametrize("speeds", [(1000,), (1000, 1000), (10**9, 1000, 1000), (1000, 10**9, 1000, 1000)])
def test_a_tier_is_slow_only_when_it_was_slow_three_times_in_a_row(speeds):
    rig = Rig(host=4, disk=16)
    rig.warm()
    rig.warm([7] * 4 * CHUNK, "other")
    measured(rig, *speeds)
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) == 4 * CHUNK


def test_who_wants_everything_loaded_gets_it():
    rig = Rig(host=4, disk=16, loading="always")
    rig.warm()
    rig.warm([7] * 4 * CHUNK, "other")
    measured(rig, 1000, 1000, 1000)
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) == 4 * CHUNK


def test_a_slow_tier_is_crossed_for_what_lies_behind_it():
    rig = Rig(host=16, disk=16)
    rig.warm()
    measured(rig, 50_000, 50_000, 50_000)  # 0.13 s a chunk, computing takes 0.06
    for key in SCHEME.keys(PROMPT)[:1]:
        rig.store.unlearn(key, HOST)
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) == 4 * CHUNK
    for key in SCHEME.keys(PROMPT)[1:]:
        rig.store.unlearn(key, HOST)
    assert rig.planner.matched("a", PROMPT, 0) == 0


def test_what_the_device_holds_is_left_alone_to_the_block():
    rig = Rig()
    rig.warm()
    rig.planner.begin("b", PROMPT, [])
    computed = CHUNK + 2 * BLOCK
    assert rig.planner.matched("b", PROMPT, computed) == 4 * CHUNK - computed
    table = rig.table(len(PROMPT))
    rig.planner.allocated("b", table, 4 * CHUNK - computed)
    assert rig.planner.sources("b") == {HOST: 4 * CHUNK - computed}
    (plan,) = rig.planner.step([])
    assert plan.moves[0].key == SCHEME.keys(PROMPT)[1]
    assert plan.moves[0].blocks == (SKIP, SKIP, table[6], table[7])
    assert plan.moves[1].blocks == tuple(table[8:12])


def test_a_device_that_holds_more_than_we_do_asks_nothing_of_us():
    rig = Rig()
    rig.warm()
    rig.planner.begin("b", PROMPT, [])
    assert rig.planner.matched("b", PROMPT, 4 * CHUNK) == 0


def test_chunked_prefill_saves_each_chunk_once_when_it_is_complete():
    rig = Rig()
    rig.planner.begin("a", PROMPT, [])
    table, saved = rig.table(len(PROMPT)), []
    for start in range(0, len(PROMPT), 100):
        new = min(100, len(PROMPT) - start)
        plans = rig.planner.step([Scheduled("a", PROMPT, start, new, table)])
        rig.settle(plans)
        saved.append(sum(len(plan.moves) for plan in plans))
    assert saved == [1, 2, 1]


def test_decoded_tokens_become_chunks_too():
    rig = Rig()
    tokens = list(PROMPT[: CHUNK - 1])
    rig.planner.begin("a", tokens, [])
    rig.settle(rig.serve("a", tokens))
    tokens.append(5)
    (plan,) = rig.planner.step([Scheduled("a", tokens, CHUNK - 1, 1, rig.table(CHUNK))])
    assert [move.key for move in plan.moves] == SCHEME.keys(tokens)


def test_tenants_and_adapters_never_share():
    rig = Rig()
    rig.planner.begin("a", PROMPT, [("salt", "one")])
    rig.settle(rig.serve("a", PROMPT))
    for tags in ([], [("salt", "two")], [("lora", "one")]):
        rig.planner.begin("b", PROMPT, tags)
        assert rig.planner.matched("b", PROMPT, 0) == 0


def test_while_redis_is_asked_the_request_waits_and_then_loads_what_it_holds():
    rig = Rig(host=16, redis=100)
    rig.planner.begin("a", PROMPT, [])
    assert rig.asked == [4]
    assert rig.planner.matched("a", PROMPT, 0) is None
    rig.answers[0].set_result(3)
    assert rig.planner.matched("a", PROMPT, 0) == 3 * CHUNK
    rig.planner.allocated("a", rig.table(len(PROMPT)), 3 * CHUNK)
    (plan,) = rig.planner.step([])
    assert [m.tier for m in plan.moves] == [REDIS] * 3
    rig.settle([plan])
    assert rig.store.fill()[HOST] == (3, 16)
    rig.store.check()


def test_redis_is_asked_only_for_what_is_not_here():
    rig = Rig(host=16, redis=100)
    rig.warm(PROMPT[: 2 * CHUNK + 1])
    rig.planner.begin("b", PROMPT, [])
    assert rig.asked[-1] == 2
    rig.answers[-1].set_result(0)
    assert rig.planner.matched("b", PROMPT, 0) == 2 * CHUNK


def test_an_answer_that_takes_a_moment_does_not_cost_a_step():
    rig = Rig(host=16, redis=100)
    rig.planner.begin("a", PROMPT, [])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(rig.answers[0].set_result, 3)
        assert rig.planner.matched("a", PROMPT, 0) == 3 * CHUNK


def test_a_step_waits_a_moment_for_redis_and_not_one_for_every_request(monkeypatch):
    waited = []
    monkeypatch.setattr(
        "cacheengine.connectors.planner.wait",
        lambda _, seconds: (waited.append(seconds), time.sleep(seconds)),
    )
    rig = Rig(host=16, redis=100)
    for name in "abc":
        rig.planner.begin(name, PROMPT, [])
        assert rig.planner.matched(name, PROMPT, 0) is None
    rig.planner.step([])
    assert rig.planner.matched("c", PROMPT, 0) is None
    rig.planner.step([])
    assert rig.planner.matched("a", PROMPT, 0) is None  # it had its moment
    assert waited == [GRACE_SECONDS] * 2


def test_a_slow_redis_is_a_miss_not_a_wait():
    rig = Rig(host=16, redis=100)
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) is None
    rig.clock.now = 1.1
    assert rig.planner.matched("a", PROMPT, 0) == 0
    assert rig.tally.take()["cairn_engine_probe_timeouts_total", ()] == 1


def test_the_second_asker_waits_for_the_read_that_is_under_way():
    rig = Rig(host=3, disk=16)
    rig.warm()
    rig.warm([7] * 3 * CHUNK, "other")  # pushes the first prompt out of the host tier
    rig.planner.begin("a", PROMPT, [])
    assert rig.planner.matched("a", PROMPT, 0) == 3 * CHUNK
    rig.planner.allocated("a", rig.table(len(PROMPT)), 3 * CHUNK)
    plans = rig.planner.step([])
    rig.planner.begin("b", PROMPT, [])
    assert rig.planner.matched("b", PROMPT, 0) is None
    rig.settle(plans)
    assert rig.planner.matched("b", PROMPT, 0) == 3 * CHUNK
    assert [m.tier for m in plans[0].moves] == [DISK] * 3


def test_a_failed_load_is_counted_and_not_offered_again():
    rig = Rig(host=3, disk=16)
    rig.warm()
    rig.warm([7] * 3 * CHUNK, "other")
    rig.planner.begin("a", PROMPT, [])
    rig.planner.allocated("a", rig.table(len(PROMPT)), rig.planner.matched("a", PROMPT, 0))
    rig.settle(rig.planner.step([]), kept=1)
    assert rig.tally.take()["cairn_engine_failed_tokens_total", ()] == 2 * CHUNK
    rig.planner.begin("b", PROMPT, [])
    assert rig.planner.matched("b", PROMPT, 0) == CHUNK
    rig.store.check()


def test_a_plan_counts_when_every_rank_has_spoken_and_the_least_word_stands():
    rig = Rig(ranks=2)
    rig.planner.begin("a", PROMPT, [])
    (plan,) = rig.serve("a", PROMPT)
    rig.planner.report({plan.id: (1, 4)})
    assert rig.store.fill()[HOST][0] == 0
    rig.planner.report({plan.id: (1, 2)})
    assert rig.store.fill()[HOST][0] == 2
    rig.store.check()


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_aborted_request_leaves_clean_books(when):
    rig = Rig(host=16, redis=100)
    rig.planner.begin("a", PROMPT, [])
    rig.answers[0].set_result(4)
    if when == "during":
        rig.planner.allocated("a", rig.table(len(PROMPT)), rig.planner.matched("a", PROMPT, 0))
    rig.planner.end("a")
    rig.settle(rig.planner.step([]))
    rig.store.check()
    assert rig.planner.load()["waiting"] == 0


def test_a_prompt_that_waits_is_queued_without_what_is_held_of_it():
    rig = Rig()
    rig.warm()
    rig.planner.begin("a", PROMPT, [])
    rig.planner.begin("b", [5] * 3 * CHUNK, [])
    assert rig.planner.load()["queued_tokens"] == len(PROMPT) - 4 * CHUNK + 3 * CHUNK


def test_a_redis_that_could_not_say_is_not_a_redis_that_holds_nothing():
    """Else one outage would bury what stands on the disk behind a chunk only Redis holds."""
    rig = Rig(host=16, disk=16, redis=100)
    rig.warm()
    for tier in (HOST, DISK):  # the first chunk is only in Redis now; its followers are here
        rig.store.unlearn(SCHEME.keys(PROMPT)[0], tier)
    rig.planner.begin("a", PROMPT, [])
    rig.answers[-1].set_result(-1)
    assert rig.planner.matched("a", PROMPT, 0) == 0
    assert rig.store.holds(SCHEME.keys(PROMPT)[3])


def test_a_load_that_brought_nothing_is_not_promised_to_that_request_again():
    """The engine frees the request and asks again: without this, for ever."""
    rig = Rig()
    rig.warm()
    rig.planner.begin("a", PROMPT, [])
    rig.planner.allocated("a", rig.table(len(PROMPT)), rig.planner.matched("a", PROMPT, 0))
    rig.settle(rig.planner.step([]), kept=0)
    assert rig.planner.matched("a", PROMPT, 0) == 0
    rig.planner.begin("b", PROMPT, [])
    assert rig.planner.matched("b", PROMPT, 0) == 4 * CHUNK


def test_a_prompt_larger_than_the_tiers_keeps_its_beginning_and_decodes_in_peace():
    rig = Rig(host=3, disk=3)
    tokens = list(PROMPT)
    rig.planner.begin("a", tokens, [])
    table, saved = rig.table(len(tokens) + 64), []
    for start in range(0, len(tokens), CHUNK):
        new = min(CHUNK, len(tokens) - start)
        plans = rig.planner.step([Scheduled("a", tokens, start, new, table)])
        rig.settle(plans)
        saved.append(sum(len(plan.moves) for plan in plans if plan.kind == "save"))
    for step in range(5):
        plans = rig.planner.step([Scheduled("a", tokens, len(tokens) + step, 1, table)])
        rig.settle(plans)
        saved.append(sum(plan.kind == "save" for plan in plans))
    assert saved == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    rig.planner.begin("b", PROMPT, [])
    assert rig.planner.matched("b", PROMPT, 0) == 3 * CHUNK
