"""The index fed any interleaving of events equals a model, once everybody has had a turn.

The writers are real and run here step by step instead of on their threads; the server is a real Valkey.
"""

from dataclasses import replace

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from cacheengine.index_schema import Depths, Entry, chunk_name, field_of, lease_name
from cacheengine.index_wire import Wire
from cacheengine.index_writer import IndexWriter, _Superseded
from cacheengine.keys import ChunkKey
from tests.cacheengine.index_rig import FORK, INFO, NS, PROMPT, Loop, wait_until
from tests.conftest import ValkeyServer

PROMPTS = (PROMPT, FORK)  # share five chunks and their root
KEYS = sorted({*PROMPT, *FORK})
TIERS = (1, 2, 4, 8)
TTL = 60.0

prompts, tiers, depths = st.sampled_from(PROMPTS), st.sampled_from(TIERS), st.integers(1, len(PROMPT))


class Life:
    """One process of a worker, with what it holds."""

    def __init__(self, url: str, worker_id: str, bits: dict[ChunkKey, int]) -> None:
        self.bits = bits
        info = replace(INFO, worker_id=worker_id)
        self.writer = IndexWriter(url, info, TTL, 60, dict, self.inventory, max_pending=30, check_seconds=TTL)
        self.wire = Wire(url, TTL, self.writer._marks)
        self.silent = False  # something happened that no beat can notice
        self.settle()

    def inventory(self) -> list[Entry]:
        return [Entry(PROMPT[0], key, bits) for key, bits in self.bits.items()]

    def change(self, keys: list[ChunkKey], tier: int, *, held: bool, told: bool = True) -> None:
        before = dict(self.bits)
        for key in keys:
            bits = self.bits.pop(key, 0)
            if bits := bits | tier if held else bits & ~tier:
                self.bits[key] = bits
        if told:
            self.say([key for key in keys if before.get(key) != self.bits.get(key)])
        self.silent |= not told

    def say(self, keys: list[ChunkKey]) -> None:
        self.writer.publish([Entry(PROMPT[0], key, self.bits.get(key, 0)) for key in keys])

    def turn(self) -> None:
        self.writer._next_beat = 0.0  # nothing to wait for
        try:
            self.writer._turn(self.wire)
        except redis.exceptions.ConnectionError:  # as its thread does
            self.wire.close()
            self.wire = Wire(self.writer._url, TTL, self.writer._marks)
            self.turn()

    def settle(self) -> None:
        self.turn()
        while self.writer._dirty or self.writer._pending:
            self.turn()
        if self.silent:
            until = self.writer.stats.rounds + 2  # the one under way may have begun before
            while self.writer.stats.rounds < until:
                self.writer._next_check = 0.0
                self.turn()
            self.silent = False

    def expected(self) -> dict[str, Depths]:
        return {
            name: Depths(*(sum(bool(self.bits.get(key, 0) & tier) for key in keys) for tier in TIERS))
            for name, keys in (("prompt", PROMPT), ("fork", FORK))
        }


class Index(RuleBasedStateMachine):
    server: ValkeyServer
    loop: Loop

    def __init__(self) -> None:
        super().__init__()
        self.server.flush()
        self.client = self.server.client()
        self.alive = {
            "a": Life(self.server.unix_url, "a", dict.fromkeys(PROMPT, 2)),
            "b": Life(self.server.unix_url, "b", dict.fromkeys({*PROMPT[:5], *FORK}, 6)),
        }
        self.over: list[Life] = []
        self.saved: dict[bytes, tuple[int, bytes]] | None = None

    def teardown(self) -> None:
        self.settle()
        for life in [*self.alive.values(), *self.over]:
            life.wire.close()
        self.client.close()

    def life(self, name: str) -> Life:
        if name not in self.alive:
            self.alive[name] = Life(self.server.unix_url, name, {})
        return self.alive[name]

    @rule(name=st.sampled_from("ab"), keys=prompts, tier=tiers, depth=depths)
    def put(self, name: str, keys: list[ChunkKey], tier: int, depth: int) -> None:
        self.life(name).change(keys[:depth], tier, held=True)

    @rule(name=st.sampled_from("ab"), keys=prompts, tier=tiers, depth=depths)
    def evict(self, name: str, keys: list[ChunkKey], tier: int, depth: int) -> None:
        gone = keys[depth:]
        if depth < 5:  # the other prompt stands on these too
            gone = sorted({*PROMPT[depth:], *FORK[depth:]})
        self.life(name).change(gone, tier, held=False)

    @rule(name=st.sampled_from("ab"), keys=prompts, depth=depths, held=st.booleans())
    def change_and_tell_nobody(self, name: str, keys: list[ChunkKey], depth: int, held: bool) -> None:
        life = self.life(name)
        if held:
            life.change(keys[:depth], 2, held=True, told=False)
        else:
            life.change(sorted({*PROMPT[5:], *FORK[5:]}), 2, held=False, told=False)

    @rule(name=st.sampled_from("ab"), keys=st.lists(st.sampled_from(KEYS)))
    def say_again(self, name: str, keys: list[ChunkKey]) -> None:
        self.life(name).say(keys)

    @rule(name=st.sampled_from("ab"))
    def overflow(self, name: str) -> None:
        flood = [Entry(ChunkKey(bytes(16)), ChunkKey(bytes([n] * 16)), 1) for n in range(31)]
        self.life(name).writer.publish(flood)

    @rule(name=st.sampled_from("ab"))
    def one_turn(self, name: str) -> None:
        self.life(name).turn()

    @rule(name=st.sampled_from("ab"), keys=prompts, kept=depths)
    def restart(self, name: str, keys: list[ChunkKey], kept: int) -> None:
        old = self.life(name)
        self.over.append(old)
        held = {key: old.bits[key] for key in keys[:kept] if key in old.bits}
        self.alive[name] = Life(self.server.unix_url, name, held)

    @rule(name=st.sampled_from("ab"))
    def die(self, name: str) -> None:
        self.over.append(self.life(name))
        del self.alive[name]
        self.client.delete(lease_name(NS.hex(), name))

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def the_dead_speak(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(self.over))
        life.change(PROMPT[:3], 1, held=True, told=False)
        life.wire.write(life.writer._info, life.inventory())

    @rule()
    def flush(self) -> None:
        self.client.flushall()
        self.client.script_flush()

    @rule()
    def hang_up_on_everybody(self) -> None:
        self.client.client_kill_filter(_type="normal", skipme=True)

    @rule()
    def save(self) -> None:
        names = list(self.client.scan_iter())
        self.saved = {name: (max(0, int(self.client.pttl(name))), self.client.dump(name)) for name in names}  # type: ignore[misc]

    @precondition(lambda self: self.saved is not None)
    @rule()
    def come_back_with_older_data(self) -> None:
        assert self.saved is not None
        self.client.flushall()
        for name, (ttl, value) in self.saved.items():
            self.client.restore(name, ttl, value)

    @rule(key=st.sampled_from(KEYS))
    def lose_one_hash(self, key: ChunkKey) -> None:
        self.client.delete(chunk_name(NS, PROMPT[0], key))
        for life in self.alive.values():
            life.silent = True

    @rule(name=st.sampled_from("ab"), key=st.sampled_from(KEYS), bits=st.integers(1, 15))
    def write_something_wrong(self, name: str, key: ChunkKey, bits: int) -> None:
        life = self.life(name)
        told = {entry.key for entry in life.writer._told.still(PROMPT[0], KEYS)}
        if key in told:  # what was never told cannot be there
            self.client.hset(chunk_name(NS, PROMPT[0], key), field_of(name, life.writer.epoch), bits)
            life.silent = True

    @rule()
    def settle(self) -> None:
        for life in list(self.alive.values()):
            life.settle()
        wait_until(lambda: not self.loop.down(PROMPT))  # it may have been hung up on
        for what, keys in (("prompt", PROMPT), ("fork", FORK)):
            found = self.loop.holders(keys)
            for name, life in self.alive.items():
                assert found.get((name, life.writer.epoch), Depths()) == life.expected()[what]
        fleet = self.loop.fleet()  # a lease that came back with older data may stand until it expires
        for name, life in self.alive.items():
            assert fleet[name].info.epoch == life.writer.epoch


def test_the_index_equals_a_model_after_any_interleaving_of_events(valkey: ValkeyServer) -> None:
    loop = Loop(valkey.unix_url, deadline_ms=2000)

    class Here(Index):
        pass

    Here.server, Here.loop = valkey, loop
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Here,
            settings=settings(
                deadline=None, max_examples=150, stateful_step_count=30,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    finally:
        loop.close()


def test_a_life_that_is_over_stops_when_it_hears_of_its_successor(valkey: ValkeyServer) -> None:
    old = Life(valkey.unix_url, "a", {})
    new = Life(valkey.unix_url, "a", {})
    with pytest.raises(_Superseded):
        old.turn()
    old.wire.close()
    new.wire.close()
