"""`cairn lookup|inspect|warm|pin|unpin|clear` on a real Valkey, a real index writer and a real store."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from cacheengine.keys import ChunkKey, KeyScheme, Namespace
from cacheengine.wishes import names_of, read
from gateway.app import create_app
from gateway.ask import Ask
from gateway.cache_view import find_roots
from gateway.cli import app
from gateway.config import GatewayConfig
from tests.conftest import ValkeyServer
from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.cache_rig import MODEL, NS, PAYLOAD, SCHEME, SLOTS, CacheWorker

IDS = list(range(100, 100 + 16 * 5 + 7))
KEYS = SCHEME.keys(IDS)
Cairn = Callable[..., Result]


@pytest.fixture
def cairn(valkey: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cairn:
    """cairn(*words) → its result; the Redis is the test's, and no stack of this machine is seen."""
    for name in [name for name in os.environ if name.startswith("CAIRN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CAIRN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CAIRN_REDIS_URL", valkey.url)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words, **options: runner.invoke(app, [str(word) for word in words], **options)


@pytest.fixture
def start(valkey: ValkeyServer) -> Iterator[Callable[..., CacheWorker]]:
    started: list[CacheWorker] = []

    def one(worker_id: str = "w1", **options: Any) -> CacheWorker:
        worker = CacheWorker(valkey.url, worker_id, **options)
        started.append(worker)
        wait_until(lambda: worker.writer.stats.beats)
        return worker

    yield one
    for worker in started:
        worker.close()


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """A file with the token ids of a prompt of five chunks and a bit."""
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(IDS))
    return path


def held(result: Result) -> dict[str, dict[str, Any]]:
    """Rows of --json by worker."""
    assert result.exit_code == 0, result.output
    return {row["worker"]: row for part in json.loads(result.stdout) for row in part["workers"]}


def announced(worker: CacheWorker, chunks: int) -> None:
    wait_until(lambda: worker.writer.stats.written >= chunks)


def sentence(result: Result, code: int) -> str:
    """What was said on the way out: one line, no traceback."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("cairn: ")
    return line.removeprefix("cairn: ")


# -- lookup --------------------------------------------------------------------------------------------


def test_lookup_says_how_much_each_worker_holds_in_which_tier(cairn, start, ids):
    first, second = start("w1"), start("w2")
    first.hold(KEYS[:4])
    first.share(KEYS[:2])
    announced(first, 4)
    rows = held(cairn("lookup", "--tokens", ids, "--json"))
    assert {k: rows["w1"][k] for k in ("chunks", "hit", "host", "redis")} == {
        "chunks": 5, "hit": 4, "host": 4, "redis": 2,
    }  # fmt: skip
    assert (rows["w2"]["hit"], rows["w2"]["host"], rows["w2"]["redis"]) == (2, 0, 2)
    assert second.store.inventory() == []


def test_lookup_prints_a_table_for_people(cairn, start, ids):
    worker = start()
    worker.hold(KEYS[:3])
    announced(worker, 3)
    shown = cairn("lookup", "--tokens", ids).stdout
    assert f"{len(IDS)} tokens, 5 chunks of 16" in shown
    assert "3 of 5 chunks, 48 tokens" in shown


def test_half_a_blob_is_no_hit(cairn, start, ids, valkey):
    worker = start()
    worker.share(KEYS[:2])
    with valkey.client() as client:
        client.delete(f"smol/test%401@1@0@{KEYS[1].hex()}")
    assert held(cairn("lookup", "--tokens", ids, "--json"))["w1"]["hit"] == 1


def test_lookup_takes_chunk_keys_from_the_middle_of_a_prompt(cairn, start):
    worker = start()
    worker.hold(KEYS)
    announced(worker, 5)
    row = held(cairn("lookup", "--key", KEYS[3].hex(), "--key", KEYS[4].hex(), "--json"))["w1"]
    assert (row["chunks"], row["host"]) == (2, 2)


def test_what_an_earlier_life_held_is_not_shown(cairn, start, ids):
    worker = start()
    worker.hold(KEYS)
    announced(worker, 5)
    worker.close()
    start("w1")
    assert held(cairn("lookup", "--tokens", ids, "--json"))["w1"]["hit"] == 0


def test_a_text_is_tokenized_as_the_worker_would(cairn, start, smollm, smollm_path, tmp_path):
    def encode(ask: dict[str, Any]) -> list[int]:
        return smollm.tokens(msgspec.convert(ask, Ask), "messages" in ask).ids

    text = "The quick brown fox jumps over the lazy dog. " * 8
    chat = [{"role": "user", "content": text}]
    (tmp_path / "text").write_text(text)
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    with serve(FakeVLLM(encode=encode)) as url:
        worker = start(http=url, model_path=str(smollm_path))
        prompt = SCHEME.keys(encode({"prompt": text}))
        worker.hold(prompt)
        announced(worker, len(prompt))
        for way in (("--prompt", text), ("--file", tmp_path / "text"), ("--file", "-")):
            row = held(cairn("lookup", *way, "--json", input=text))["w1"]
            assert row["hit"] == row["chunks"] == len(prompt) > 3
        as_chat = json.loads(cairn("lookup", "--messages", tmp_path / "chat.json", "--json").stdout)[0]
        assert as_chat["keys"] == [key.hex() for key in SCHEME.keys(encode({"messages": chat}))]


def test_a_tenants_salt_in_a_chat_request_changes_the_keys(cairn, start, smollm_path, tmp_path):
    start(model_path=str(smollm_path))
    chat = {"messages": [{"role": "user", "content": "again " * 40}]}
    found = []
    for salt in ({}, {"cache_salt": "ann"}):
        (tmp_path / "chat.json").write_text(json.dumps(chat | salt))
        found.append(json.loads(cairn("lookup", "--messages", tmp_path / "chat.json", "--json").stdout)[0])
    assert found[0]["tokens"] == found[1]["tokens"]
    assert not set(found[0]["keys"]) & set(found[1]["keys"])


def test_a_worker_that_tokenizes_in_another_way_is_not_asked_about_a_text(cairn, start, smollm_path):
    with serve(FakeVLLM(encode=lambda ask: [1, 2, 3])) as url:
        start(http=url, model_path=str(smollm_path))
        assert "tokenizes unlike this machine" in sentence(cairn("lookup", "--prompt", "x"), 1)


def test_a_model_folder_that_is_not_here_can_be_named(cairn, start, smollm_path):
    start(model_path="/somewhere/else")
    assert "--tokenizer" in sentence(cairn("lookup", "--prompt", "x"), 1)
    assert cairn("lookup", "--prompt", "x", "--tokenizer", smollm_path).exit_code == 0


def test_each_namespace_of_a_model_has_its_own_keys(cairn, start, ids):
    other = KeyScheme(Namespace(bytes(range(16))), 32)
    start("w1")
    start("w2", scheme=other)
    parts = json.loads(cairn("lookup", "--tokens", ids, "--json").stdout)
    assert {part["chunk_tokens"]: len(part["keys"]) for part in parts} == {16: 5, 32: 2}


# -- inspect -------------------------------------------------------------------------------------------


def test_inspect_shows_holders_blob_and_frame_and_checks_the_payload(cairn, start):
    worker = start()
    worker.hold(KEYS)
    worker.share(KEYS)
    announced(worker, 5)
    (fact,) = json.loads(cairn("inspect", KEYS[1].hex(), "--json").stdout)
    (blob,) = fact["blobs"]
    assert fact["held"] == {"w1": ["host"]}
    assert fact["pinned"] is False
    assert blob["verdict"] == "whole"
    assert blob["bytes"] == PAYLOAD + 128
    assert 0 < blob["ttl_seconds"]["bytes"] <= 1000
    assert blob["metadata"]["model_name"] == MODEL
    assert (blob["frame"]["key"], blob["frame"]["root"]) == (KEYS[1].hex(), KEYS[0].hex())
    assert "whole" in cairn("inspect", KEYS[1].hex()).stdout


@pytest.mark.parametrize(("at", "said"), [(5000, "payload checksum"), (60, "header checksum")])
def test_inspect_finds_a_flipped_byte(cairn, start, valkey, at, said):
    start().share(KEYS[:1])
    with valkey.client() as client:
        name = f"smol/test%401@1@0@{KEYS[0].hex()}_bytes"
        client.setrange(name, at, bytes([client.getrange(name, at, at)[0] ^ 1]))
    (fact,) = json.loads(cairn("inspect", KEYS[0].hex(), "--json").stdout)
    assert fact["blobs"][0]["verdict"] == f"bad frame: {said}"


@pytest.mark.parametrize(("gone", "said"), [("", "no metadata"), ("_bytes", "no bytes")])
def test_inspect_says_which_half_of_a_blob_is_missing(cairn, start, valkey, gone, said):
    start().share(KEYS[:1])
    with valkey.client() as client:
        client.delete(f"smol/test%401@1@0@{KEYS[0].hex()}{gone}")
    (fact,) = json.loads(cairn("inspect", KEYS[0].hex(), "--json").stdout)
    assert fact["blobs"][0]["verdict"].startswith(said)


def test_a_chunk_nobody_knows_is_exit_1(cairn, start):
    start()
    assert KEYS[0].hex() in sentence(cairn("inspect", KEYS[0].hex()), 1)


def test_an_entrys_root_is_found_from_its_key_alone(valkey, start):
    worker = start()
    worker.hold(KEYS)
    announced(worker, 5)
    with valkey.client() as client:
        roots = find_roots(client, NS.hex(), [KEYS[4], ChunkKey(bytes(16))])
    assert roots == {KEYS[4]: KEYS[0][:8]}


# -- warm ----------------------------------------------------------------------------------------------


@pytest.fixture
def vllm() -> Iterator[tuple[FakeVLLM, str]]:
    fake = FakeVLLM(cached_tokens=4)
    with serve(fake) as url:
        yield fake, url


def test_warm_computes_the_prompt_and_waits_until_it_is_stored(cairn, start, ids, vllm):
    fake, url = vllm
    worker = start()

    def compute() -> None:
        wait_until(lambda: fake.asked)
        worker.hold(KEYS)

    thread = threading.Thread(target=compute)
    thread.start()
    done = cairn("warm", "--tokens", ids, "--url", url)
    thread.join()
    assert done.exit_code == 0, done.output
    assert "5 tokens computed, 4 were there already, 5 chunks stored" in done.stdout  # the fake counts 9
    path, body = fake.asked[0]
    assert path == "/v1/completions"
    assert json.loads(body) == {"prompt": IDS, "model": MODEL, "max_tokens": 1, "stream": False}


def test_warm_shows_the_gateway_a_key_and_workers_none(cairn, start, ids, vllm, tmp_path, monkeypatch):
    fake, url = vllm
    start(http=url).hold(KEYS)
    store = str(tmp_path / "keys.yaml")
    key = cairn("keys", "create", "--tenant", "ops", "--file", store).stdout.strip()
    config = GatewayConfig(workers=[f"{MODEL}={url}"], auth="keys", keys_file=store)
    with serve(create_app(config)) as gateway:
        said = sentence(cairn("warm", "--tokens", ids, "--url", gateway), 1)
        assert "asks for an API key: set CAIRN_API_KEY" in said
        monkeypatch.setenv("CAIRN_API_KEY", key)
        done = cairn("warm", "--tokens", ids, "--url", gateway)
        assert done.exit_code == 0, done.output
        assert cairn("warm", "--tokens", ids, "--worker", "w1").exit_code == 0
    assert len(fake.asked) == 2
    assert not any(b"authorization" in heard for heard in fake.headers)


def test_warm_can_be_done_by_one_worker(cairn, start, ids, vllm):
    fake, url = vllm
    start("w1").hold(KEYS)
    worker = start("w2", http=url)
    worker.hold(KEYS)
    result = json.loads(cairn("warm", "--tokens", ids, "--worker", "w2", "--json").stdout)
    assert len(fake.asked) == 1
    assert (result["computed_tokens"], result["cached_tokens"], result["stored_chunks"]) == (5, 4, 5)


def test_warm_says_how_much_is_stored_when_it_is_not_all(cairn, start, ids, vllm):
    start(http=vllm[1]).hold(KEYS[:2])
    said = sentence(cairn("warm", "--tokens", ids, "--worker", "w1", "--timeout", "0.5"), 1)
    assert said == "computed, but only 2 of 5 chunks are stored so far"


def test_what_the_worker_says_against_a_prompt_is_passed_on(cairn, start, ids, vllm):
    vllm[0].status = 400
    start(http=vllm[1])
    assert "answered 400: the worker says no" in sentence(cairn("warm", "--tokens", ids, "--worker", "w1"), 1)


def test_warm_without_a_gateway_says_who_did_not_answer(cairn, start, ids):
    start()
    assert "no answer from http://127.0.0.1:9" in sentence(
        cairn("warm", "--tokens", ids, "--url", "http://127.0.0.1:9"), 1
    )


def test_an_unknown_worker_is_told_the_known_ones(cairn, start, ids):
    start()
    assert sentence(cairn("warm", "--tokens", ids, "--worker", "w9"), 2).endswith("there are: w1")


# -- pin and unpin -------------------------------------------------------------------------------------


def test_pin_reaches_every_worker_and_says_what_each_holds(cairn, start, ids):
    first, second = start("w1"), start("w2")
    first.hold(KEYS[:3])
    announced(first, 3)
    done = cairn("pin", "--tokens", ids, "--json")
    assert first.pins == second.pins == set(KEYS)
    assert "2 of 2 workers have pinned" in done.stderr
    assert [row["host"] for row in held(done).values()] == [3, 0]


def test_what_is_pinned_is_not_evicted_until_it_is_unpinned(cairn, start, ids):
    worker = start()
    crowd = SCHEME.keys(range(1000, 1000 + 16 * (SLOTS - 1)))
    worker.hold(KEYS)
    assert cairn("pin", "--tokens", ids).exit_code == 0
    worker.hold(crowd)
    announced(worker, 5)
    assert held(cairn("lookup", "--tokens", ids, "--json"))["w1"]["host"] == 5
    assert cairn("unpin", "--tokens", ids).exit_code == 0
    worker.hold(SCHEME.keys(range(9000, 9000 + 16 * (SLOTS - 1))))
    assert not any(worker.store.holds(key) for key in KEYS[2:])


def test_pins_outlive_the_worker_and_unpin_ends_them(cairn, start, ids):
    worker = start()
    assert cairn("pin", "--tokens", ids).exit_code == 0
    worker.close()
    again = start()
    assert again.pins == set(KEYS)
    assert cairn("unpin", KEYS[0].hex(), KEYS[1].hex()).exit_code == 0
    assert again.pins == set(KEYS[2:])


def test_the_blobs_of_pinned_chunks_do_not_expire_until_unpinned(cairn, start, ids, valkey):
    start().share(KEYS)
    with valkey.client() as client:
        names = [f"smol/test%401@1@0@{key.hex()}{half}" for key in KEYS for half in ("", "_bytes")]
        assert cairn("pin", "--tokens", ids).exit_code == 0
        assert {client.ttl(name) for name in names} == {-1}
        (fact,) = json.loads(cairn("inspect", KEYS[0].hex(), "--json").stdout)
        assert fact["pinned"] is True
        assert fact["blobs"][0]["ttl_seconds"] == {"metadata": None, "bytes": None}
        assert cairn("unpin", "--tokens", ids).exit_code == 0
        assert all(0 < client.ttl(name) <= 86_400 for name in names)


def test_a_worker_that_cannot_obey_is_named_and_the_wish_stands(cairn, start, ids, valkey):
    start("w1")
    deaf = start("w2")
    deaf.deaf = True
    said = sentence(cairn("pin", KEYS[0].hex(), "--timeout", "1", "--json"), 1)
    assert said.startswith("1 of 2 workers have pinned in 1 s; not yet: w2")
    with valkey.client() as client:
        assert read(client, NS.hex()).pins == {KEYS[0]}
    deaf.deaf = False
    wait_until(lambda: deaf.pins == {KEYS[0]})


def test_a_prompt_without_a_chunk_cannot_be_pinned(cairn, start, ids):
    start()
    ids.write_text("[1, 2, 3]")
    assert sentence(cairn("pin", "--tokens", ids), 1) == "the prompt is shorter than a chunk of 16 tokens"


# -- clear ---------------------------------------------------------------------------------------------


def blobs(valkey: ValkeyServer) -> list[bytes]:
    with valkey.client() as client:
        return sorted(name for name in client.scan_iter("*@*"))


def test_clear_empties_every_worker_and_the_models_blobs(cairn, start, ids, valkey):
    first, second = start("w1"), start("w2")
    for worker in (first, second):
        worker.hold(KEYS)
        announced(worker, 5)
    first.share(KEYS)
    done = cairn("clear", "--yes")
    assert done.exit_code == 0, done.output
    assert "10 keys" in done.stdout
    assert "2 of 2 workers have cleared" in done.stderr
    assert (blobs(valkey), first.store.inventory(), second.store.inventory()) == ([], [], [])
    wait_until(
        lambda: not any(row["host"] for row in held(cairn("lookup", "--tokens", ids, "--json")).values())
    )


def test_clear_touches_no_other_models_keys_and_no_strangers(cairn, start, valkey):
    start("w1").share(KEYS)
    start("w2", model="smol", scheme=replace(SCHEME, namespace=Namespace(bytes(range(16))))).share(KEYS[:1])
    with valkey.client() as client:
        client.set("smol/test%401@notes", "mine")
        client.set(f"smol/test%401@1@0@{KEYS[0].hex()}_bytes2", "mine")
    before = set(blobs(valkey))
    assert cairn("clear", "--model", MODEL, "--yes").exit_code == 0
    left = {name.decode() for name in blobs(valkey)}
    assert left == {
        "smol/test%401@notes", f"smol/test%401@1@0@{KEYS[0].hex()}_bytes2",
        *(f"smol@1@0@{KEYS[0].hex()}{half}" for half in ("", "_bytes")),
    }  # fmt: skip
    assert len(before) == len(left) + 10


@pytest.mark.parametrize("model", ["a*", "a[bc]d", "a?c", "a\\b", "a b%@c"])
def test_a_models_name_is_no_pattern(cairn, start, model):
    start("w1", model=model).share(KEYS[:1])
    start("w2", model="abcd", scheme=replace(SCHEME, namespace=Namespace(bytes(range(16))))).share(KEYS[:1])
    assert "2 keys" in cairn("clear", "--model", model, "--yes").stdout


def test_pins_stay_wishes_through_a_clear(cairn, start, ids, valkey):
    worker = start()
    cairn("pin", "--tokens", ids)
    cairn("clear", "--yes")
    with valkey.client() as client:
        assert client.scard(names_of(NS.hex())[1]) == 5
    assert worker.pins == set(KEYS)


def test_a_worker_that_was_down_clears_when_it_starts_and_only_once(cairn, start, tmp_path):
    note = tmp_path / "disk" / "wishes.json"
    start("w1", note=note).close()
    done = cairn("clear", "--model", MODEL, "--yes")
    assert "0 of 0 workers have cleared" in done.stderr
    second = start("w1", note=note)
    assert second.cleared == 1
    second.close()
    assert start("w1", note=note).cleared == 0


def test_clear_without_a_terminal_needs_yes(cairn, start):
    worker = start()
    assert "--yes" in sentence(cairn("clear"), 2)
    assert worker.cleared == 0


def test_clear_of_a_model_nobody_ever_served_is_exit_1(cairn, start):
    start()
    assert "no worker, alive or not" in sentence(cairn("clear", "--model", "nobody", "--yes"), 1)


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lookup"], "name one prompt"),
        (["lookup", "--prompt", "x", "--key", "00" * 16], "name one prompt"),
        (["lookup", "--key", "banana"], "'banana' is no chunk key"),
        (["lookup", "--file", "/no/such/file"], "cannot read /no/such/file: No such file"),
        (["lookup", "--tokens", "{bad}"], "is not JSON"),
        (["lookup", "--tokens", "{object}"], "a JSON list of token ids"),
        (["lookup", "--tokens", "{negative}"], "a JSON list of token ids"),
        (["lookup", "--messages", "{object}"], "a list of chat messages"),
        (["lookup", "--file", "{binary}"], "is not UTF-8"),
        (["inspect"], "name chunk keys"),
        (["pin"], "name one prompt"),
        (["pin", "abc"], "'abc' is no chunk key"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(cairn, start, tmp_path, words, said):
    start()
    files = {"bad": b"{", "object": b"{}", "negative": b"[1, -1]", "binary": b"\xff\xfe"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: str(tmp_path / name) for name in files}
    assert said in sentence(cairn(*(word.format(**paths) for word in words)), 2)


def test_without_a_redis_it_says_what_to_do(cairn, monkeypatch):
    monkeypatch.delenv("CAIRN_REDIS_URL")
    assert "CAIRN_REDIS_URL" in sentence(cairn("lookup", "--prompt", "x"), 2)


def test_a_redis_that_is_away_is_one_sentence_without_its_password(cairn):
    result = cairn("lookup", "--prompt", "x", "--redis-url", "redis://:hunter2@127.0.0.1:1/0")
    assert "does not answer" in sentence(result, 1)
    assert "hunter2" not in result.output


@pytest.mark.parametrize("url", ["http://:hunter2@h", "hunter2", "redis://:hunter2@h:port"])
def test_what_is_no_redis_url_is_one_sentence_without_its_password(cairn, url):
    result = cairn("lookup", "--prompt", "x", "--redis-url", url)
    assert "redis_url" in sentence(result, 2)
    assert "hunter2" not in result.output


def test_no_worker_alive_is_said(cairn):
    assert "no worker is alive" in sentence(cairn("lookup", "--prompt", "x"), 1)


def test_a_worker_that_names_chunks_in_another_way_is_not_asked(cairn, start, ids):
    start("w1", probes=("aa", "bb"))
    assert "w1 name chunks in another way" in sentence(cairn("lookup", "--tokens", ids), 1)
    start("w2")
    assert list(held(cairn("lookup", "--tokens", ids, "--json"))) == ["w2"]


def test_one_of_several_models_must_be_named(cairn, start, ids):
    start("w1")
    start("w2", model="other", scheme=replace(SCHEME, namespace=Namespace(bytes(range(16)))))
    assert "smol/test@1" in sentence(cairn("lookup", "--tokens", ids), 2)
    assert cairn("lookup", "--tokens", ids, "--model", "other").exit_code == 0
    assert "alive: other, smol/test@1" in sentence(cairn("lookup", "--tokens", ids, "--model", "third"), 1)


@pytest.mark.e2e
def test_as_a_command_it_prints_what_can_be_piped(start, ids, valkey, tmp_path):
    worker = start()
    worker.hold(KEYS)
    announced(worker, 5)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "lookup", "--tokens", str(ids), "--json"],
        capture_output=True,
        text=True,
        env=clean | {"CAIRN_HOME": str(tmp_path), "CAIRN_REDIS_URL": valkey.url},
        check=True,
    )
    assert json.loads(done.stdout)[0]["workers"][0]["hit"] == 5
    assert done.stderr == ""
