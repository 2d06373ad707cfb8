"""Wishes on a real Valkey: said once, obeyed by every worker, not lost when a server or a worker is."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cacheengine import wishes
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from cacheengine.wishes import Listener, TooManyPins, Wish, make, model_of, names_of, obeyed_in, parse_key
from tests.conftest import ValkeyServer

NS = namespace_of({"model": "wishes"})
HEX = NS.hex()
KEYS = KeyScheme(NS, 16).keys(range(16 * 6))


class Worker:
    """A listener and what it was told, beaten by hand."""

    def __init__(self, note: Path | None = None) -> None:
        self.told: list[tuple[Wish, Wish]] = []
        self.broken = False
        self.listener = Listener(HEX, "m", self.obey, note)

    def obey(self, wish: Wish, before: Wish) -> None:
        if self.broken:
            raise OSError("no")
        self.told.append((wish, before))

    def beat(self, client: redis.Redis) -> bool:
        with client.pipeline(transaction=False) as pipe:
            self.listener.ask(pipe)
            return self.listener.hear(client, pipe.execute())

    @property
    def clears(self) -> int:
        return sum(wish.clear_epoch != before.clear_epoch for wish, before in self.told)

    @property
    def pins(self) -> frozenset[ChunkKey]:
        """As the last order that was about pins said."""
        orders = [wish.pins for wish, before in self.told if wish.pins_version != before.pins_version]
        return orders[-1] if orders else frozenset()


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        yield client


def pin(client: redis.Redis, *keys: ChunkKey) -> int:
    return make(client, HEX, "pin", keys, "me")[0]


@pytest.fixture
def limited(valkey: ValkeyServer, client: redis.Redis) -> Iterator[str]:
    """A URL of the worker that docs/operations.md tells people to create."""
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("ACL SETUSER cairn-worker "))
    client.execute_command(*line.split())
    yield f"redis://cairn-worker:PASSWORD@127.0.0.1:{valkey.port}"
    client.execute_command("ACL DELUSER", "cairn-worker")


def test_a_worker_with_the_documented_rights_obeys_and_tells_again(client, limited):
    worker = Worker()
    pin(client, *KEYS[:2])
    with redis.Redis.from_url(limited) as mine:
        assert worker.beat(mine)
        client.flushdb()
        worker.beat(mine)
    assert worker.pins == wishes.read(client, HEX).pins == set(KEYS[:2])


def test_a_starting_worker_with_the_documented_rights_hears_what_it_missed(client, limited):
    worker = Worker()
    make(client, HEX, "clear", (), "me")
    worker.listener.start(limited)
    assert worker.clears == 1


def test_a_worker_that_heard_nothing_is_told_nothing(client):
    worker = Worker()
    assert not worker.beat(client)
    assert worker.told == []


def test_a_pin_is_obeyed_with_the_next_beat_and_announced(client):
    worker, number = Worker(), pin(client, *KEYS[:2])
    assert worker.beat(client)
    assert worker.pins == set(KEYS[:2])
    assert obeyed_in(worker.listener.words()).pins_version == number


def test_what_was_obeyed_is_not_obeyed_twice(client):
    worker = Worker()
    pin(client, KEYS[0])
    make(client, HEX, "clear", (), "me")
    assert worker.beat(client)
    assert not worker.beat(client)
    assert (len(worker.told), worker.clears) == (1, 1)


def test_unpinning_takes_away_what_was_named_and_nothing_else(client):
    worker = Worker()
    pin(client, *KEYS[:3])
    worker.beat(client)
    assert make(client, HEX, "unpin", KEYS[1:5], "me")[1] == 2
    worker.beat(client)
    assert worker.pins == {KEYS[0]}


def test_a_pin_does_not_clear_and_a_clear_does_not_unpin(client):
    worker = Worker()
    pin(client, KEYS[0])
    worker.beat(client)
    make(client, HEX, "clear", (), "me")
    worker.beat(client)
    assert (worker.pins, worker.clears) == ({KEYS[0]}, 1)


def test_a_person_can_read_who_said_what(client):
    make(client, HEX, "clear", (), "ann@desk")
    held = client.hgetall(names_of(HEX)[0])
    assert held[b"clear_by"] == b"ann@desk"
    assert int(held[b"clear_at"]) == int(held[b"clear_epoch"]) // 1_000_000  # seconds, microseconds


def test_every_pin_is_a_key_in_hex(client):
    pin(client, KEYS[0])
    assert client.smembers(names_of(HEX)[1]) == {KEYS[0].hex().encode()}


def test_what_somebody_else_put_among_the_pins_is_left_out(client):
    client.sadd(names_of(HEX)[1], "banana", "zz" * 16, b"\xff")
    pin(client, KEYS[0])
    worker = Worker()
    worker.beat(client)
    assert worker.pins == {KEYS[0]}


def test_too_many_pins_are_refused_and_change_nothing(client, monkeypatch):
    monkeypatch.setattr(wishes, "MAX_PINS", 3)
    pin(client, *KEYS[:2])
    with pytest.raises(TooManyPins, match="2 chunks are pinned and at most 3"):
        pin(client, *KEYS[:4])
    assert client.scard(names_of(HEX)[1]) == 2
    pin(client, *KEYS[:3])  # two of them are there already


def test_a_wish_that_fails_is_not_announced_and_is_tried_again(client):
    worker = Worker()
    worker.broken = True
    number = make(client, HEX, "clear", (), "me")[0]
    assert not worker.beat(client)
    assert obeyed_in(worker.listener.words()).clear_epoch == 0
    worker.broken = False
    assert worker.beat(client)
    assert obeyed_in(worker.listener.words()).clear_epoch == number


def test_a_worker_that_was_down_obeys_before_it_serves(client, valkey, tmp_path):
    make(client, HEX, "clear", (), "me")
    pin(client, KEYS[0])
    worker = Worker(tmp_path / "wishes.json")
    worker.listener.start(valkey.url)
    assert (worker.pins, worker.clears) == ({KEYS[0]}, 1)


def test_a_restart_pins_again_and_does_not_clear_again(client, valkey, tmp_path):
    note = tmp_path / "disk" / "wishes.json"
    first = Worker(note)
    pin(client, KEYS[0])
    make(client, HEX, "clear", (), "me")
    first.beat(client)
    second = Worker(note)
    second.listener.start(valkey.url)
    assert (second.pins, second.clears) == ({KEYS[0]}, 0)
    assert not second.beat(client)


def test_pins_are_back_at_a_start_without_redis(client, tmp_path):
    first = Worker(tmp_path / "wishes.json")
    pin(client, KEYS[0])
    first.beat(client)
    second = Worker(tmp_path / "wishes.json")
    second.listener.start("redis://127.0.0.1:1/0")
    assert second.pins == {KEYS[0]}


def test_a_clear_that_failed_at_start_is_tried_again_with_the_first_beat(client, valkey, tmp_path):
    make(client, HEX, "clear", (), "me")
    worker = Worker(tmp_path / "wishes.json")
    worker.broken = True
    worker.listener.start(valkey.url)
    worker.broken = False
    assert worker.beat(client)
    assert worker.clears == 1


def test_numbers_that_are_none_stop_no_worker(client, valkey, tmp_path):
    pin(client, KEYS[0])
    client.hset(f"cairn:{{{HEX}}}:wishes", mapping={"pins_version": "many", "clear_epoch": ""})
    worker = Worker(tmp_path / "wishes.json")
    worker.listener.start(valkey.url)
    worker.beat(client)
    assert worker.clears == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"namespace": 3}', '{"pins": []}', "null"])
def test_a_damaged_note_is_no_note(text, tmp_path):
    (tmp_path / "wishes.json").write_text(text)
    assert Worker(tmp_path / "wishes.json").listener.obeyed == Wish()


def test_another_namespaces_note_is_no_note(client, tmp_path):
    worker = Worker(tmp_path / "wishes.json")
    pin(client, KEYS[0])
    worker.beat(client)
    other = Listener("00" * 16, "m", worker.obey, tmp_path / "wishes.json")
    assert other.obeyed == Wish()


def test_a_note_is_its_owners_alone(client, tmp_path):
    worker = Worker(tmp_path / "wishes.json")
    pin(client, KEYS[0])
    worker.beat(client)
    assert (tmp_path / "wishes.json").stat().st_mode & 0o777 == 0o600


def test_a_server_that_lost_everything_is_told_again(client):
    worker = Worker()
    make(client, HEX, "clear", (), "me")
    number = pin(client, *KEYS[:2])
    worker.beat(client)
    client.flushall()
    worker.beat(client)
    assert wishes.read(client, HEX) == Wish(number, worker.listener.obeyed.clear_epoch, frozenset(KEYS[:2]))
    assert (worker.pins, worker.clears) == (set(KEYS[:2]), 1)


def test_pins_that_were_evicted_alone_are_told_again(client):
    worker = Worker()
    pin(client, *KEYS[:2])
    worker.beat(client)
    client.delete(names_of(HEX)[1])
    worker.beat(client)
    assert wishes.read(client, HEX).pins == set(KEYS[:2])


def test_a_worker_that_joins_while_the_pins_are_lost_does_not_lose_them_for_all(client):
    old, new = Worker(), Worker()
    pin(client, *KEYS[:2])
    old.beat(client)
    client.delete(names_of(HEX)[1])
    new.beat(client)  # learns the number and no pins
    old.beat(client)
    new.beat(client)
    assert old.pins == new.pins == wishes.read(client, HEX).pins == set(KEYS[:2])


def test_of_two_workers_the_one_that_heard_last_is_believed(client):
    old, young = Worker(), Worker()
    pin(client, KEYS[0])
    old.beat(client)
    pin(client, KEYS[1])
    young.beat(client)
    client.flushall()
    old.beat(client)
    young.beat(client)
    old.beat(client)
    assert old.pins == young.pins == set(KEYS[:2])


def test_a_new_wish_counts_also_on_a_server_that_lost_everything(client):
    worker = Worker()
    make(client, HEX, "clear", (), "me")
    worker.beat(client)
    client.flushall()
    make(client, HEX, "clear", (), "me")
    worker.beat(client)
    assert worker.clears == 2


def test_the_model_of_a_namespace_is_remembered_when_its_workers_are_gone(client):
    assert model_of(client, HEX) == ""
    Worker().beat(client)
    assert model_of(client, HEX) == "m"


@pytest.mark.parametrize("text", ["", "00", "g" * 32, "00" * 17, " " + "0" * 31, "é" * 32])
def test_what_is_no_key_is_none(text):
    assert parse_key(text) is None


class Wishing(RuleBasedStateMachine):
    """Whatever is said, lost and restarted in between: after a beat a worker pins what Redis says."""

    server: ValkeyServer
    folder: Path

    @initialize()
    def begin(self) -> None:
        self.client = self.server.client()
        self.client.flushall()
        self.note = self.folder / "wishes.json"
        self.note.unlink(missing_ok=True)
        self.worker = Worker(self.note)
        self.said: set[ChunkKey] | None = None  # None: the server knows of nothing
        self.clears_said = 0

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1))
    def pin(self, keys: set[ChunkKey]) -> None:
        pin(self.client, *keys)
        self.said = (self.said or set()) | keys

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1))
    def unpin(self, keys: set[ChunkKey]) -> None:
        make(self.client, HEX, "unpin", keys, "me")
        self.said = (self.said or set()) - keys

    @rule()
    def beat(self) -> None:
        self.worker.beat(self.client)
        held = self.worker.listener.obeyed
        if self.said is None:
            self.said = set(held.pins) if held.pins_version else None
        assert self.worker.pins == held.pins == (self.said or set())

    @rule()
    def clear_and_beat(self) -> None:
        before = self.worker.clears
        make(self.client, HEX, "clear", (), "me")
        self.beat()
        assert self.worker.clears == before + 1

    @rule()
    def restart(self) -> None:
        """Without Redis: what it pins then, it was told in an earlier life."""
        self.worker = Worker(self.note)
        self.worker.listener.start("")
        assert self.worker.clears == 0

    @rule()
    def lose_everything(self) -> None:
        time.sleep(0.01)  # the server's clock goes on meanwhile
        self.client.flushall()
        self.said = None

    @invariant()
    def numbers_are_of_one_moment(self) -> None:
        found = wishes.read(self.client, HEX)
        assert found.pins == (self.said or set())

    def teardown(self) -> None:
        self.client.close()


def test_after_every_beat_a_worker_pins_what_was_said(valkey, tmp_path):
    Wishing.server, Wishing.folder = valkey, tmp_path
    run_state_machine_as_test(
        Wishing,
        settings=settings(
            deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
        ),
    )
