"""The map's promises: two phases, leases, prefix closure, honest books."""

import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cacheengine.evict import LRU
from cacheengine.keys import ChunkKey, KeyScheme, Namespace
from cacheengine.plan import DISK, GONE, HOST, NO_PARENT, REDIS, Plan, Want
from cacheengine.store import Store

SCHEME = KeyScheme(Namespace(b"n" * 16), 16)


def chain(tokens: list[int], tenant: str = "") -> list[Want]:
    keys = SCHEME.keys(tokens)
    return [Want(k, keys[i - 1] if i else NO_PARENT, keys[0], 1, (i,), tenant) for i, k in enumerate(keys)]


TRUNK = chain(list(range(16 * 8)))
FORK = TRUNK[:3] + chain(list(range(16 * 3)) + [7] * 16 * 5)[3:]
OTHER = chain([9] * 16 * 8)
NOTHING: frozenset[ChunkKey] = frozenset()


def save(store: Store, wants: list[Want], kept: int | None = None) -> Plan:
    """Store what is not here yet, and write all of it to the tiers below."""
    plan = store.begin_save("r", wants, spare={want.key for want in wants})
    assert plan is not None
    store.settle(plan.id, len(plan.moves) if kept is None else kept)
    for tier in store.lower:
        while below := store.begin_demote(tier, 100):
            store.settle(below.id, len(below.moves))
    return plan


def depth(store: Store, wants: list[Want]) -> int:
    return store.depth([want.key for want in wants])


def bits(store: Store, want: Want) -> int:
    return {change.key: change.bits for change in store.inventory()}.get(want.key, 0)


def drop_from_host(store: Store, want: Want) -> None:
    store.unlearn(want.key, HOST)


def test_nothing_is_found_before_it_is_settled():
    store = Store({HOST: 8})
    plan = store.begin_save("r", TRUNK[:3])
    assert depth(store, TRUNK) == 0
    store.settle(plan.id, 3)
    assert depth(store, TRUNK) == 3
    store.check()


def test_a_save_that_failed_leaves_no_trace():
    store = Store({HOST: 8, DISK: 8})
    plan = store.begin_save("r", TRUNK[:3])
    store.settle(plan.id, 1)
    store.settle(store.begin_demote(DISK, 9).id, 0)
    assert depth(store, TRUNK) == 1
    assert bits(store, TRUNK[0]) == 2
    store.check()


def test_a_full_tier_gives_up_the_tail_of_the_oldest_prompt():
    store = Store({HOST: 8})
    save(store, TRUNK[:4])
    save(store, OTHER[:4])
    save(store, chain([3] * 16 * 2))
    assert depth(store, TRUNK) == 2
    assert depth(store, OTHER) == 4
    store.check()


def test_a_prompt_saved_in_steps_is_still_given_up_from_its_end():
    store = Store({HOST: 8})
    for end in range(2, 9, 2):
        save(store, TRUNK[:end])
    save(store, OTHER[:1])
    assert depth(store, TRUNK) == 7


def test_a_leased_prefix_is_never_evicted_nor_is_what_it_stands_on():
    store = Store({HOST: 4})
    save(store, TRUNK[:4])
    plan = store.begin_load("r", TRUNK[2:4], NOTHING)  # the device holds the first two
    assert store.begin_save("s", OTHER[:2]) is None
    store.settle(plan.id, 2)
    assert save(store, OTHER[:2]).moves
    store.check()


def test_what_is_being_written_below_is_not_given_away():
    store = Store({HOST: 2, DISK: 8})
    plan = store.begin_save("r", TRUNK[:2])
    store.settle(plan.id, 2)
    below = store.begin_demote(DISK, 2)
    assert [move.key for move in below.moves] == [want.key for want in TRUNK[:2]]
    assert store.begin_save("s", OTHER[:1]) is None
    store.settle(below.id, 2)
    assert store.begin_save("s", OTHER[:1]) is not None


@pytest.mark.parametrize("slots", [3, 4])
def test_room_for_a_chunk_is_never_made_by_giving_up_what_stands_before_it(slots):
    store = Store({HOST: 8, DISK: slots})
    save(store, TRUNK[:3])
    for want in reversed(TRUNK[:3]):
        drop_from_host(store, want)  # the prefix is on disk alone, and fills it but for a slot
    store.settle(store.begin_save("r", TRUNK[3:5]).id, 2)
    writing = store.begin_demote(DISK, 8)
    assert (len(writing.moves) if writing else 0) == slots - 3
    assert depth(store, TRUNK) == 5
    if writing:
        store.settle(writing.id, 1)
    store.check()


def test_a_prefix_is_written_below_from_its_front_and_once():
    store = Store({HOST: 8, DISK: 8})
    plan = store.begin_save("r", TRUNK[:5])
    store.settle(plan.id, 5)
    first, second = store.begin_demote(DISK, 3), store.begin_demote(DISK, 3)
    assert [m.key for p in (first, second) for m in p.moves] == [want.key for want in TRUNK[:5]]
    assert store.begin_demote(DISK, 3) is None
    store.settle(second.id, 2)
    store.settle(first.id, 3)
    assert store.fill()[DISK] == (5, 8)
    store.check()


def test_only_what_was_used_again_is_written_when_cold_chunks_must_wait():
    store = Store({HOST: 8, DISK: 8})
    for wants in (TRUNK[:3], OTHER[:3]):
        store.settle(store.begin_save("r", wants).id, 3)
    assert store.begin_demote(DISK, 8, cold=False) is None
    store.use(OTHER[1].key)
    plan = store.begin_demote(DISK, 8, cold=False)
    assert [move.key for move in plan.moves] == [OTHER[0].key, OTHER[1].key]
    store.settle(plan.id, 0)
    assert store.begin_demote(DISK, 8, cold=False) is None  # it failed: not again before it is used again
    store.use(OTHER[0].key)
    assert len(store.begin_demote(DISK, 8, cold=False).moves) == 1


def test_chunks_that_leave_the_host_before_they_were_written_are_counted():
    store = Store({HOST: 2, DISK: 8})
    store.settle(store.begin_save("r", TRUNK[:2]).id, 2)
    store.settle(store.begin_save("r", OTHER[:2]).id, 2)
    assert store.lost()["unwritten", DISK] == 2
    assert len(store.begin_demote(DISK, 8).moves) == 2


def test_disk_keeps_what_host_evicts_and_a_load_brings_it_back():
    store = Store({HOST: 2, DISK: 8})
    save(store, TRUNK[:2])
    save(store, OTHER[:2])
    assert store.tier_of(TRUNK[0].key) == DISK
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    assert [m.tier for m in plan.moves] == [DISK, DISK]
    store.settle(plan.id, 2)
    assert store.tier_of(TRUNK[0].key) == HOST
    assert bits(store, TRUNK[0]) == 6
    store.check()


def test_a_failed_read_is_forgotten_with_everything_behind_it():
    store = Store({HOST: 2, DISK: 8})
    save(store, TRUNK[:2])
    save(store, OTHER[:2])
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    store.settle(plan.id, 0)
    assert depth(store, TRUNK) == 0
    assert not store.holds(TRUNK[1].key)
    store.check()


def test_what_left_between_lookup_and_load_is_gone_not_wrong():
    store = Store({HOST: 2})
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    assert [m.tier for m in plan.moves] == [GONE, GONE]
    store.settle(plan.id, 0)
    store.check()


def test_chunks_seen_in_redis_are_loaded_into_the_host_tier():
    store = Store({HOST: 4, REDIS: 100})
    store.learn(TRUNK[:3], REDIS)
    plan = store.begin_load("r", TRUNK[:3], frozenset(w.key for w in TRUNK[:3]))
    assert [m.tier for m in plan.moves] == [REDIS] * 3
    store.settle(plan.id, 2)
    assert depth(store, TRUNK) == 2
    assert not store.holds(TRUNK[2].key)
    store.check()


def test_two_loads_of_one_chunk_share_it_in_the_end():
    store = Store({HOST: 4, DISK: 4})
    save(store, TRUNK[:1])
    drop_from_host(store, TRUNK[0])
    first = store.begin_load("a", TRUNK[:1], NOTHING)
    second = store.begin_load("b", TRUNK[:1], NOTHING)
    assert store.arriving(TRUNK[0].key)
    store.settle(first.id, 1)
    store.settle(second.id, 1)
    assert store.fill()[HOST] == (1, 4)
    store.check()


def test_a_save_does_not_leave_a_gap():
    store = Store({HOST: 8})
    assert store.begin_save("r", TRUNK[2:4]) is None


def test_a_restart_takes_in_only_what_a_lookup_can_reach():
    store = Store({HOST: 2, DISK: 8})
    found = {5: TRUNK[0], 2: TRUNK[1], 7: TRUNK[3], 99: OTHER[0]}
    assert store.restore(DISK, found) == 2
    assert depth(store, TRUNK) == 2
    assert store.begin_load("r", TRUNK[:2], NOTHING).moves[0].slot == 5
    assert store.fill()[DISK] == (2, 8)


def test_changes_tell_the_index_every_tier_and_every_end():
    store = Store({HOST: 1, DISK: 1})
    save(store, TRUNK[:1])
    assert [(c.key, c.bits) for c in store.drain_changes()] == [(TRUNK[0].key, 6)]
    save(store, OTHER[:1])
    changes = {c.key: c.bits for c in store.drain_changes()}
    assert changes == {TRUNK[0].key: 0, OTHER[0].key: 6}
    assert store.drain_changes() == []
    assert {c.key for c in store.inventory()} == {OTHER[0].key}


def test_a_tail_is_nobodys_business_but_ours():
    store = Store({HOST: 8}, full=2)
    full = [want._replace(size=2) for want in TRUNK[:2]]
    save(store, [*full, TRUNK[2]])
    assert depth(store, TRUNK) == 3
    assert {c.key for c in store.drain_changes()} == {want.key for want in full}
    assert {c.key for c in store.inventory()} == {want.key for want in full}


def test_clear_forgets_everything_and_keeps_what_is_read_still_until_it_was_read():
    store = Store({HOST: 8, DISK: 8})
    save(store, TRUNK[:2])
    save(store, OTHER[:2])
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    slots = store.clear()
    assert len(slots) == 4
    assert (depth(store, TRUNK), depth(store, OTHER)) == (0, 0)
    again = store.begin_save("s", OTHER[:8])
    assert not {m.host for m in again.moves} & {m.host for m in plan.moves}
    store.settle(plan.id, 2)
    store.settle(again.id, 6)
    store.erased(slots)
    assert store.fill() == {HOST: (6, 8), DISK: (0, 8)}
    store.check()


def test_a_clear_that_need_not_erase_keeps_no_slot_back():
    store = Store({HOST: 8, DISK: 8})
    save(store, TRUNK[:2])
    loading = store.begin_load("r", TRUNK[:2], NOTHING)
    store.settle(store.begin_save("s", OTHER[:2]).id, 2)
    writing = store.begin_demote(DISK, 2)
    store.clear(erase=False)
    store.settle(loading.id, 2)
    store.settle(writing.id, 2)
    assert (store.to_erase(), store.fill()) == ([], {HOST: (0, 8), DISK: (0, 8)})
    store.check()


def test_a_slot_that_was_read_during_a_clear_is_given_to_nobody_before_it_is_empty():
    store = Store({HOST: 8, DISK: 8})
    save(store, TRUNK[:2])
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    slots = store.clear()
    store.settle(plan.id, 2)
    assert sorted(store.to_erase()) == sorted(slots)
    store.check()


def test_clear_voids_what_is_under_way_and_names_the_disk_slots_it_wrote():
    store = Store({HOST: 8, DISK: 8})
    saving = store.begin_save("r", TRUNK[:2])
    store.settle(store.begin_save("s", OTHER[:2]).id, 2)
    writing = store.begin_demote(DISK, 2)
    assert store.clear() == []
    store.settle(saving.id, 2)
    store.settle(writing.id, 2)
    assert not any(map(store.holds, (want.key for want in TRUNK + OTHER)))
    assert sorted(store.to_erase()) == sorted(move.slot for move in writing.moves)
    store.check()
    store.erased(store.to_erase())
    assert store.fill() == {HOST: (0, 8), DISK: (0, 8)}
    store.check()


def test_clear_also_empties_slots_of_what_had_left_before():
    """Their headers are as they were, and a restart believes headers."""
    store = Store({HOST: 8, DISK: 8})
    save(store, TRUNK[:3])
    store.unlearn(TRUNK[1].key, HOST)
    store.unlearn(TRUNK[1].key, DISK)  # and what stood behind it
    assert store.fill()[DISK] == (1, 8)
    slots = store.clear()
    assert sorted(slots) == [0, 1, 2]
    store.erased(slots)
    store.check()


def test_clear_also_empties_what_a_restart_could_not_reach():
    store = Store({HOST: 2, DISK: 8})
    store.restore(DISK, {5: TRUNK[0], 7: TRUNK[3]})
    assert {5, 7} <= set(store.clear())
    store.check()


def test_a_cleared_slot_that_is_read_still_is_given_to_nobody_before_it_is_empty():
    store = Store({HOST: 4, DISK: 2})
    save(store, TRUNK[:2])
    drop_from_host(store, TRUNK[1])
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    slots = store.clear()
    store.settle(plan.id, 2)  # before the disk was told
    store.settle(store.begin_save("s", OTHER[:2]).id, 2)
    assert store.begin_demote(DISK, 2) is None
    store.erased(slots)
    store.erased(store.to_erase())
    store.check()
    assert store.fill()[DISK] == (0, 2)
    store.settle(store.begin_save("s", FORK[:2]).id, 2)
    assert len(store.begin_demote(DISK, 2).moves) == 2


def test_clear_without_erasing_keeps_no_slot_back():
    store = Store({HOST: 8, DISK: 4})
    store.settle(store.begin_save("r", TRUNK[:3]).id, 3)
    writing = store.begin_demote(DISK, 3)
    store.clear(erase=False)
    store.settle(writing.id, 3)
    assert store.to_erase() == []
    save(store, OTHER[:4])
    assert store.fill()[DISK] == (4, 4)
    store.check()


def test_a_pinned_prompt_outlives_any_pressure_until_it_is_unpinned():
    store = Store({HOST: 4})
    store.set_pins({want.key for want in TRUNK[:2]})
    save(store, TRUNK[:2])
    assert store.pinned() == 2
    for i in range(5):
        save(store, chain([50 + i] * 32))
    assert depth(store, TRUNK) == 2
    store.set_pins(set())
    save(store, OTHER[:4])
    assert depth(store, TRUNK) == 0
    store.check()


class Counting(dict):
    looks = 0

    def __contains__(self, key):
        Counting.looks += 1
        return super().__contains__(key)


def test_a_tier_full_of_pins_says_so_in_one_pass():
    """Every step of every request asks again; a walk to the leaf from every chunk would be a square."""
    store = Store({HOST: 400})
    prompt = chain([5] * 16 * 400)
    save(store, prompt)
    store.set_pins({want.key for want in prompt})
    shelf = store._held.shelves[HOST]
    shelf.at = Counting(shelf.at)
    Counting.looks = 0
    assert store.begin_save("r", OTHER[:1]) is None
    assert Counting.looks <= 3 * 400
    store.set_pins({want.key for want in prompt[:399]})
    assert store.begin_save("r", OTHER[:1]) is not None


def test_beside_a_pinned_branch_another_is_given_up():
    store = Store({HOST: 8})
    save(store, TRUNK[:5])
    save(store, FORK[:6])
    store.set_pins({TRUNK[4].key})
    save(store, OTHER[:3])
    assert (depth(store, TRUNK), depth(store, FORK), depth(store, OTHER)) == (5, 3, 3)
    store.check()


def test_a_tenant_beyond_its_share_makes_room_among_its_own():
    store = Store({HOST: 8}, share=0.5)
    quiet, loud = chain([1] * 16 * 3, "quiet"), [chain([5 + i] * 16 * 2, "loud") for i in range(9)]
    save(store, quiet)
    for wants in loud:
        save(store, wants)
    assert depth(store, quiet) == 3
    assert [depth(store, wants) for wants in loud] == [0] * 7 + [2, 2]
    store.check()


def test_below_its_share_a_tenant_takes_from_whoever_has_most():
    store = Store({HOST: 6}, share=0.7)
    loud, modest = chain([1] * 16 * 4, "loud"), chain([2] * 16 * 2, "modest")
    save(store, loud)
    save(store, modest)
    save(store, chain([3] * 16, "third"))
    assert (depth(store, loud), depth(store, modest)) == (3, 2)
    store.check()


def test_chunks_unused_for_their_time_to_live_are_forgotten_and_pins_are_not():
    now = [0.0]
    store = Store({HOST: 16}, clock=lambda: now[0])
    for wants in (TRUNK[:3], OTHER[:3]):
        save(store, wants)
    pinned = chain([77] * 32)
    save(store, pinned)
    store.set_pins({pinned[1].key})
    now[0] = 10.0
    store.use(TRUNK[1].key)
    for _ in range(3):
        store.expire(before=5.0)
    assert (depth(store, TRUNK), depth(store, OTHER), depth(store, pinned)) == (2, 0, 2)
    store.check()


@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_random_steps_keep_the_books(seed):
    rng, open_plans = random.Random(seed), []
    store = Store({HOST: 6, DISK: 9, REDIS: 11}, share=rng.choice([1.0, 0.6]))
    for _ in range(10_000):
        wants = rng.choice([TRUNK, FORK, OTHER])
        wants = wants[: rng.randint(1, 8)]
        verb = rng.choice(["load", "save", "demote", "settle", "settle", "settle", "rare", "learn", "use"])
        if verb == "load":
            remote = frozenset(w.key for w in wants if rng.random() < 0.3)
            start = rng.randrange(len(wants))
            open_plans.append(store.begin_load("r", wants[start:], remote))
        elif verb == "save":
            open_plans.append(store.begin_save("r", wants))
        elif verb == "demote":
            tier, limit, cold = rng.choice([DISK, REDIS]), rng.randint(1, 4), rng.random() < 0.7
            open_plans.append(store.begin_demote(tier, limit, cold))
        elif verb == "learn":
            store.learn(wants, REDIS)
        elif verb == "use":
            store.use(wants[-1].key)
        elif verb == "rare" and rng.random() < 0.1:
            rare = rng.choice(["clear", "erased", "pin", "expire", "unlearn"])
            if rare == "clear":
                store.clear()
            elif rare == "erased":
                store.erased(store.to_erase())
            elif rare == "pin":
                store.set_pins({w.key for w in wants[:3]})
            elif rare == "unlearn":
                store.unlearn(wants[-1].key, rng.choice([HOST, DISK, REDIS]))
            else:
                store.expire(time.monotonic(), limit=3)
        elif verb == "settle" and open_plans:
            plan = open_plans.pop(rng.randrange(len(open_plans)))
            store.settle(plan.id, rng.choice([len(plan.moves), rng.randint(0, len(plan.moves))]))
        open_plans = [plan for plan in open_plans if plan]
        store.check()
    for plan in open_plans:
        store.settle(plan.id, 0)
    store.check()


class Looks(LRU):
    """Counts what is asked of it."""

    uses = 0

    def hit(self, key):
        Looks.uses += 1
        super().hit(key)


def test_what_a_long_answer_goes_on_from_does_not_expire_under_it():
    now = [0.0]
    store = Store({HOST: 16}, clock=lambda: now[0])
    for n in range(1, 5):
        now[0] = 40.0 * n
        assert store.begin_save("r", TRUNK[:n]) is not None
        store.settle(n, 1)
        for _ in range(3):
            store.expire(before=now[0] - 60.0)
    assert depth(store, TRUNK) == 4
    now[0] = 300.0
    for _ in range(3):
        store.expire(before=240.0)
    assert depth(store, TRUNK) == 0


def test_what_a_pin_stands_on_outlives_an_idle_hour_in_the_middle_of_a_sweep():
    now = [0.0]
    store = Store({HOST: 16}, clock=lambda: now[0])
    store.set_pins({TRUNK[3].key})
    save(store, TRUNK[:3])
    store.expire(before=-1.0)
    store.expire(before=-1.0, limit=1)
    save(store, TRUNK[3:5])
    now[0] = 3600.0
    for _ in range(3):
        store.expire(before=3000.0)
    assert depth(store, TRUNK) == 4
    store.check()


def test_expiry_costs_pins_no_more_than_their_number():
    """One pass over the tree of prompts: walking up from every pin would be its square, in one step."""
    store = Store({HOST: 400}, evictor=Looks, clock=lambda: 100.0)
    prompt = chain([5] * 16 * 400)
    save(store, prompt)
    store.set_pins({want.key for want in prompt})
    Looks.uses = 0
    for _ in range(20):
        store.expire(before=1000.0)
    assert depth(store, prompt) == 400
    assert Looks.uses <= 400


def test_a_slot_that_somebody_else_still_reads_is_not_given_away():
    store = Store({HOST: 1, DISK: 1})
    save(store, TRUNK[:1])
    drop_from_host(store, TRUNK[0])
    first = store.begin_load("a", TRUNK[:1], NOTHING)
    store.settle(first.id, 0)  # its read failed, nobody else is there: forgotten
    assert not store.holds(TRUNK[0].key)

    store = Store({HOST: 4, DISK: 1})
    save(store, TRUNK[:1])
    drop_from_host(store, TRUNK[0])
    first, second = (store.begin_load(name, TRUNK[:1], NOTHING) for name in "ab")
    store.settle(first.id, 0)
    assert store.tier_of(TRUNK[0].key) == DISK
    store.settle(second.id, 0)
    assert not store.holds(TRUNK[0].key)
    store.check()


class Slots(RuleBasedStateMachine):
    """No slot a rank may be reading or writing is ever handed to another plan."""

    def __init__(self):
        super().__init__()
        self.store = Store({HOST: 4, DISK: 5})
        self.open: list[Plan] = []

    def in_use(self, tier: str) -> list[tuple[int, ChunkKey]]:
        moves = [move for plan in self.open for move in plan.moves if move.tier != GONE]
        if tier == HOST:
            return [(move.host, move.key) for move in moves]
        return [(move.slot, move.key) for move in moves if move.tier == DISK]

    def begun(self, plan):
        self.open += [plan] if plan else []

    @rule(prompt=st.sampled_from([TRUNK, FORK, OTHER]), n=st.integers(1, 6))
    def save(self, prompt, n):
        self.begun(self.store.begin_save("r", prompt[:n]))

    @rule(n=st.integers(1, 3), cold=st.booleans())
    def demote(self, n, cold):
        self.begun(self.store.begin_demote(DISK, n, cold))

    @rule(prompt=st.sampled_from([TRUNK, FORK, OTHER]), start=st.integers(0, 3), n=st.integers(1, 6))
    def load(self, prompt, start, n):
        wants = prompt[start : min(depth(self.store, prompt), start + n)]
        if wants:
            self.store.use(wants[-1].key)
            self.begun(self.store.begin_load("r", wants, NOTHING))

    @rule()
    def clear(self):
        self.store.erased(self.store.clear())

    @rule(i=st.integers(0, 50), ok=st.booleans())
    def settle(self, i, ok):
        if self.open:
            plan = self.open.pop(i % len(self.open))
            self.store.settle(plan.id, len(plan.moves) if ok else 0)
            self.store.erased(self.store.to_erase())

    @invariant()
    def one_key_a_slot(self):
        for tier in (HOST, DISK):
            owner: dict[int, ChunkKey] = {}
            for slot, key in self.in_use(tier):
                assert owner.setdefault(slot, key) == key, f"{tier} slot {slot} serves two chunks at once"

    @invariant()
    def books(self):
        self.store.check()


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
