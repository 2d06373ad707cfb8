"""The mock worker is a real process behind a real socket: what it emulates is asked of it."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from cacheengine.index_reader import Fleet, IndexReader
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from gateway.ask import Ask
from gateway.handshake import PROBE_CHAT, PROBE_PROMPT
from gateway.tokenize import ModelTokenizer
from loadtests.engine import totals
from loadtests.sse import Answer
from tests.conftest import ValkeyServer
from tests.fakes import wait_until
from tests.servers import free_port, needed

CHUNK = 4
WORDS = [f"w{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
SCHEME = KeyScheme(namespace_of({"mock": "mock", "chunk": CHUNK}), CHUNK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in which every one of WORDS is a token with its blank."""
    folder = tmp_path_factory.mktemp("model")
    vocab = {piece: number for number, piece in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        built = "\u0120"
        for letter in word:
            if built + letter not in vocab:
                vocab[built + letter] = len(vocab)
                merges.append((built, letter))
            built += letter
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


Mock = Callable[..., contextlib.AbstractContextManager[tuple[str, str]]]


@pytest.fixture(scope="module")
def start(model: Path, home: Path) -> Mock:
    """Starts two workers for the body of a `with`; yields their URLs."""
    needed(shutil.which("g++"), "g++")

    @contextlib.contextmanager
    def running(*flags: str, redis_url: str = "") -> Iterator[tuple[str, str]]:
        ports = [free_port(), free_port()]
        argv = [sys.executable, "-m", "loadtests.mock_worker", "--ports", ",".join(map(str, ports))]
        argv += ["--folder", str(home), "--tokenizer", str(model), "--chunk-tokens", str(CHUNK), *flags]
        env = {**os.environ, "CAIRN_REDIS_URL": redis_url, "CAIRN_HOME": str(home)}
        first, second = (f"http://127.0.0.1:{port}" for port in ports)
        with subprocess.Popen(argv, env=env) as process:
            try:
                wait_until(lambda: process.poll() is not None or _healthy(second), seconds=120)
                assert process.poll() is None
                yield first, second
            finally:
                process.terminate()

    return running


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


@pytest.fixture(scope="module")
def mock(start: Mock) -> Iterator[tuple[str, str]]:
    with start("--capacity", "6", "--prefill-rate", "100000", "--decode-rate", "1000") as urls:
        yield urls


def ask(url: str, prompt: Any, **more: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 2, **more})
    assert reply.status_code == 200
    return dict(reply.json())


def cached(url: str, prompt: Any) -> int:
    return int(ask(url, prompt)["usage"]["prompt_tokens_details"]["cached_tokens"])


def words(first: int, count: int) -> str:
    return " ".join(WORDS[first : first + count])


def stats(url: str) -> dict[str, int]:
    return dict(httpx.get(f"{url}/mock/stats").json())


def test_full_chunks_of_a_prompt_are_found_again_on_that_worker_only(mock: tuple[str, str]) -> None:
    one, two = mock
    prompt = words(0, 10)
    assert [cached(one, prompt), cached(one, prompt), cached(two, prompt)] == [0, 8, 0]
    assert cached(one, words(0, 6) + " " + words(20, 4)) == 4  # shares one chunk and half of another


def test_one_token_is_always_computed(mock: tuple[str, str]) -> None:
    assert [cached(mock[1], words(30, 8)), cached(mock[1], words(30, 8))] == [0, 4]


def test_the_end_of_what_was_used_longest_ago_makes_room(start: Mock) -> None:
    with start("--capacity", "4", "--prefill-rate", "100000") as (url, _):
        for first in (0, 20, 40):  # two chunks each, for four places
            cached(url, words(first, 9))
        assert cached(url, words(20, 9)) == 8
        cached(url, words(0, 5))  # one chunk: the end of the third prompt goes
        assert cached(url, words(40, 9)) == 4


def test_token_ids_are_the_same_prompt_as_their_text(mock: tuple[str, str], model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompt = words(50, 9)
    ids = tokenizer.encode(" " + prompt).ids
    assert len(ids) == 9
    assert [cached(mock[0], prompt), cached(mock[0], ids)] == [0, 8]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("completions", {"prompt": words(0, 10)}),
        ("chat/completions", {"messages": [{"role": "user", "content": words(0, 10)}]}),
    ],
)
def test_answers_are_the_same_streamed_and_not(mock: tuple[str, str], path: str, prompt: Any) -> None:
    body = {**prompt, "max_tokens": 3, "stream_options": {"include_usage": True}}
    url = f"{mock[0]}/v1/{path}"
    whole = httpx.post(url, json=body).json()
    answer = Answer(0.0)
    with httpx.stream("POST", url, json={**body, "stream": True}) as reply:
        for piece in reply.iter_raw():
            answer.feed(piece, 1.0)
    answer.finish()
    choice = whole["choices"][0]
    assert (
        answer.text == (choice["text"] if "text" in choice else choice["message"]["content"]) == " w1 w2 w3"
    )
    assert answer.completion_tokens == whole["usage"]["completion_tokens"] == 3
    assert answer.prompt_tokens == whole["usage"]["prompt_tokens"] == 10


def test_prompts_wait_for_each_other_and_who_hangs_up_makes_room(start: Mock) -> None:
    with start("--prefill-rate", "0.001") as (url, other):
        port = int(url.rpartition(":")[2])
        body = json.dumps({"prompt": words(0, 10)}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        with contextlib.ExitStack() as opened:
            for asked in range(1, 4):
                client = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
                client.sendall(request)
                wait_until(lambda asked=asked: stats(url)["waiting"] == asked)
            assert stats(url)["queued_tokens"] == 30
            assert stats(other)["waiting"] == 0
        wait_until(lambda: stats(url)["aborted"] == 3)
        left = stats(url)
        assert (left["waiting"], left["queued_tokens"], left["running"], left["finished"]) == (0, 0, 0, 0)


def test_it_tokenizes_a_gateways_probes_as_the_gateway_does(mock: tuple[str, str], home: Path) -> None:
    ours = ModelTokenizer.load(home)
    for body, chat in (({"messages": PROBE_CHAT}, True), ({"prompt": PROBE_PROMPT}, False)):
        theirs = httpx.post(f"{mock[0]}/tokenize", json=body).json()["tokens"]
        assert theirs == ours.tokens(Ask(**body), chat).ids
        assert theirs


def test_metrics_have_the_names_that_routers_read(mock: tuple[str, str]) -> None:
    found = totals(httpx.get(f"{mock[0]}/metrics").text)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total")
    assert {f"vllm:{name}" for name in names} <= set(found)


def test_its_workers_join_the_fleet_and_tell_what_they_hold(
    start: Mock, home: Path, valkey: ValkeyServer
) -> None:
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))

    async def held(prompt: str) -> dict[str, int]:
        ids = tokenizer.encode(" " + prompt).ids
        return {worker: depths.device for (worker, _), depths in (await ask_index(SCHEME.keys(ids))).items()}

    async def ask_index(keys: list[ChunkKey]) -> Any:
        reader = IndexReader(valkey.url, deadline_ms=2000)
        await reader.open()
        try:
            return await reader.holders(SCHEME.namespace, keys)
        finally:
            await reader.close()

    async def fleet() -> list[str]:
        reader = Fleet(valkey.url)
        try:
            return sorted(lease.info.worker_id for lease in await reader.read())
        finally:
            await reader.close()

    flags = ("--capacity", "2", "--prefill-rate", "100000")
    with start(*flags, redis_url=valkey.url) as (one, two):
        ids = sorted(url.partition("://")[2] for url in (one, two))
        wait_until(lambda: asyncio.run(fleet()) == ids)
        ask(two, words(0, 10))
        wait_until(lambda: asyncio.run(held(words(0, 10))) == {two.partition("://")[2]: 2})
        ask(two, words(30, 10))  # no room for both
        wait_until(lambda: asyncio.run(held(words(0, 10))) == {})
    wait_until(lambda: asyncio.run(fleet()) == [])
