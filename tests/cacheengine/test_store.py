"""The map's promises: two phases, leases, prefix closure, honest books."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cacheengine.keys import ChunkKey, KeyScheme, Namespace
from cacheengine.plan import DISK, GONE, HOST, NO_PARENT, REDIS, Plan, Want
from cacheengine.store import Store

SCHEME = KeyScheme(Namespace(b"n" * 16), 16)


def chain(tokens: list[int]) -> list[Want]:
    keys = SCHEME.keys(tokens)
    return [Want(k, keys[i - 1] if i else NO_PARENT, keys[0], (i,)) for i, k in enumerate(keys)]


TRUNK = chain(list(range(16 * 8)))
FORK = TRUNK[:3] + chain(list(range(16 * 3)) + [7] * 16 * 5)[3:]
OTHER = chain([9] * 16 * 8)
NOTHING: frozenset[ChunkKey] = frozenset()


def save(store: Store, wants: list[Want], host: int | None = None, **spills: int) -> Plan:
    plan = store.begin_save("r", wants)
    assert plan is not None
    store.settle(plan.id, HOST, len(plan.moves) if host is None else host)
    for spill in plan.spills:
        store.settle(plan.id, spill.tier, spills.get(spill.tier, len(plan.moves)))
    return plan


def depth(store: Store, wants: list[Want]) -> int:
    return next((i for i, w in enumerate(wants) if store.tier_of(w.key) is None), len(wants))


def test_nothing_is_found_before_it_is_settled():
    store = Store({HOST: 8})
    plan = store.begin_save("r", TRUNK[:3])
    assert depth(store, TRUNK) == 0
    store.settle(plan.id, HOST, 3)
    assert depth(store, TRUNK) == 3
    store.check()


def test_a_save_that_failed_leaves_no_trace():
    store = Store({HOST: 8, DISK: 8})
    plan = store.begin_save("r", TRUNK[:3])
    store.settle(plan.id, HOST, 1)
    store.settle(plan.id, DISK, 0)
    assert depth(store, TRUNK) == 1
    assert store.bits(TRUNK[0].key) == 2
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
    store.settle(plan.id, "load", 2)
    assert save(store, OTHER[:2]).moves
    store.check()


def test_what_write_behind_still_reads_is_not_given_away():
    store = Store({HOST: 2, DISK: 8})
    plan = store.begin_save("r", TRUNK[:2])
    store.settle(plan.id, HOST, 2)
    assert store.begin_save("s", OTHER[:1]) is None
    store.settle(plan.id, DISK, 2)
    assert store.begin_save("s", OTHER[:1]) is not None


def test_disk_keeps_what_host_evicts_and_a_load_brings_it_back():
    store = Store({HOST: 2, DISK: 8})
    save(store, TRUNK[:2])
    save(store, OTHER[:2])
    assert store.tier_of(TRUNK[0].key) == DISK
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    assert [m.tier for m in plan.moves] == [DISK, DISK]
    store.settle(plan.id, "load", 2)
    assert store.tier_of(TRUNK[0].key) == HOST
    assert store.bits(TRUNK[0].key) == 6
    store.check()


def test_a_failed_read_is_forgotten_with_everything_behind_it():
    store = Store({HOST: 2, DISK: 8})
    save(store, TRUNK[:2])
    save(store, OTHER[:2])
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    store.settle(plan.id, "load", 0)
    assert depth(store, TRUNK) == 0
    assert not store.holds(TRUNK[1].key)
    store.check()


def test_what_left_between_lookup_and_load_is_gone_not_wrong():
    store = Store({HOST: 2})
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    assert [m.tier for m in plan.moves] == [GONE, GONE]
    store.settle(plan.id, "load", 0)
    store.check()


def test_chunks_seen_in_redis_are_loaded_into_the_host_tier():
    store = Store({HOST: 4, REDIS: 100})
    store.learn(TRUNK[:3], REDIS)
    plan = store.begin_load("r", TRUNK[:3], frozenset(w.key for w in TRUNK[:3]))
    assert [m.tier for m in plan.moves] == [REDIS] * 3
    store.settle(plan.id, "load", 2)
    assert depth(store, TRUNK) == 2
    assert not store.holds(TRUNK[2].key)
    store.check()


def test_two_loads_of_one_chunk_share_it_in_the_end():
    store = Store({HOST: 4, DISK: 4})
    save(store, TRUNK[:1])
    store._remove(HOST, TRUNK[0].key)
    first = store.begin_load("a", TRUNK[:1], NOTHING)
    second = store.begin_load("b", TRUNK[:1], NOTHING)
    assert store.arriving(TRUNK[0].key)
    store.settle(first.id, "load", 1)
    store.settle(second.id, "load", 1)
    assert store.fill()[HOST] == (1, 4)
    store.check()


def test_a_save_does_not_leave_a_gap():
    store = Store({HOST: 8})
    assert store.begin_save("r", TRUNK[2:4]) is None


def test_a_restart_takes_in_only_what_a_lookup_can_reach():
    store = Store({HOST: 2, DISK: 8})
    found = {5: TRUNK[0], 2: TRUNK[1], 7: TRUNK[3], 99: OTHER[0]}
    taken = store.restore(DISK, {slot: (w.key, w.parent, w.root) for slot, w in found.items()})
    assert taken == 2
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


def test_clear_spares_what_is_leased():
    store = Store({HOST: 8})
    save(store, TRUNK[:2])
    save(store, OTHER[:2])
    plan = store.begin_load("r", TRUNK[:2], NOTHING)
    store.clear()
    assert (depth(store, TRUNK), depth(store, OTHER)) == (2, 0)
    store.settle(plan.id, "load", 2)
    store.check()


@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_random_steps_keep_the_books(seed):
    rng, open_legs = random.Random(seed), []
    store = Store({HOST: 6, DISK: 9, REDIS: 11})
    for _ in range(10_000):
        wants = rng.choice([TRUNK, FORK, OTHER])
        wants = wants[: rng.randint(1, 8)]
        verb = rng.choice(["load", "save", "settle", "settle", "settle", "clear", "learn"])
        if verb == "load":
            remote = frozenset(w.key for w in wants if rng.random() < 0.3)
            start = rng.randrange(len(wants))
            open_legs.append((store.begin_load("r", wants[start:], remote), "load"))
        elif verb == "save":
            plan = store.begin_save("r", wants)
            if plan:
                open_legs.append((plan, HOST))
        elif verb == "learn":
            store.learn(wants, REDIS)
        elif verb == "clear" and rng.random() < 0.02:
            store.clear()
        elif verb == "settle" and open_legs:
            plan, leg = open_legs.pop(rng.randrange(len(open_legs)))
            store.settle(plan.id, leg, rng.choice([len(plan.moves), rng.randint(0, len(plan.moves))]))
            if leg == HOST:
                open_legs += [(plan, spill.tier) for spill in plan.spills]
        store.check()
    for plan, leg in open_legs:
        store.settle(plan.id, leg, 0)
        if leg == HOST:
            for spill in plan.spills:
                store.settle(plan.id, spill.tier, 0)
    store.check()


def test_a_slot_that_somebody_else_still_reads_is_not_given_away():
    store = Store({HOST: 1, DISK: 1})
    save(store, TRUNK[:1])
    store._remove(HOST, TRUNK[0].key)
    first = store.begin_load("a", TRUNK[:1], NOTHING)
    store.settle(first.id, "load", 0)  # its read failed, nobody else is there: forgotten
    assert not store.holds(TRUNK[0].key)

    store = Store({HOST: 4, DISK: 1})
    save(store, TRUNK[:1])
    store._remove(HOST, TRUNK[0].key)
    first, second = (store.begin_load(name, TRUNK[:1], NOTHING) for name in "ab")
    store.settle(first.id, "load", 0)
    assert store.tier_of(TRUNK[0].key) == DISK
    store.settle(second.id, "load", 0)
    assert not store.holds(TRUNK[0].key)
    store.check()


class Slots(RuleBasedStateMachine):
    """No slot a rank may be reading or writing is ever handed to another plan."""

    def __init__(self):
        super().__init__()
        self.store = Store({HOST: 4, DISK: 5})
        self.open: list[tuple[Plan, str]] = []

    def in_use(self, tier: str) -> list[int]:
        slots = []
        for plan, leg in self.open:
            for i, move in enumerate(plan.moves):
                if tier == HOST and move.host >= 0 and (plan.kind == "save" or move.tier != GONE):
                    slots.append((move.host, move.key))
                if tier == DISK and plan.kind == "save":
                    slots += [
                        (s.slots[i], move.key) for s in plan.spills if s.tier == DISK and s.slots[i] >= 0
                    ]
                if tier == DISK and leg == "load" and move.tier == DISK:
                    slots.append((move.slot, move.key))
        return slots

    @rule(prompt=st.sampled_from([TRUNK, FORK, OTHER]), n=st.integers(1, 6))
    def save(self, prompt, n):
        plan = self.store.begin_save("r", prompt[:n])
        if plan:
            self.open.append((plan, HOST))

    @rule(prompt=st.sampled_from([TRUNK, FORK, OTHER]), start=st.integers(0, 3), n=st.integers(1, 6))
    def load(self, prompt, start, n):
        held = depth(self.store, prompt)
        wants = prompt[start : min(held, start + n)]
        if wants:
            self.open.append((self.store.begin_load("r", wants, NOTHING), "load"))

    @rule(i=st.integers(0, 50), ok=st.booleans())
    def settle(self, i, ok):
        if self.open:
            plan, leg = self.open.pop(i % len(self.open))
            self.store.settle(plan.id, leg, len(plan.moves) if ok else 0)
            if leg == HOST and plan.spills:
                self.open.append((plan, DISK))

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
