"""Tenants whose keys say `isolate`: what B can ask and measure does not tell B what A has asked.

Workers are native mocks with a prefix cache that heeds `cache_salt`, in Cairn's index: where isolation is off
the same measurements do see the cache, so they can fail."""

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.process import Gateway, started
from tests.gateway.test_abort_storm import mocks
from tests.gateway.test_tenants import bearer, create

pytestmark = pytest.mark.e2e

CHUNK, WORDS = (
    32,
    1500,
)  # of a prompt: enough to see whether the gateway remembers its tokens
PAIRS = 200
SURE = 0.01  # the chance of seeing a difference where there is none
SHUFFLES = 20_000


@dataclass
class House:
    gateway: Gateway
    keys: dict[str, str]  # by tenant
    words: list[str]
    rng: random.Random

    def prompt(self) -> str:
        return " ".join(self.rng.choices(self.words, k=WORDS))

    def ask(self, tenant: str, prompt: str, **more: Any) -> httpx.Response:
        body = {"model": "mock", "prompt": " " + prompt, "max_tokens": 1, **more}
        headers = {**bearer(self.keys[tenant]), "x-cairn-explain": "1"}
        reply = httpx.post(
            f"http://127.0.0.1:{self.gateway.port}/v1/completions", json=body, headers=headers, timeout=60,
            trust_env=False,
        )  # fmt: skip
        assert reply.status_code == 200, reply.text
        return reply


@pytest.fixture(scope="module")
def house(valkey_server: Any, smollm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    valkey_server.start()
    valkey_server.flush()
    folder = tmp_path_factory.mktemp("isolation")
    url = valkey_server.url
    where = ("--redis-url", url)
    keys = {name: create(where, "--tenant", name, "--isolate") for name in ("a", "b")}
    keys |= {name: create(where, "--tenant", name) for name in ("open-a", "open-b")}
    flags = ("--prefill-rate", "300000", "--chunk-tokens", str(CHUNK), "--capacity", "1000000")
    with (
        mocks(folder, smollm_path, *flags, redis_url=url),
        started(
            folder, auth="keys", index_deadline_ms=200, env={"CAIRN_REDIS_URL": url}
        ) as gateway,
    ):  # fmt: skip
        lines = (folder / "vocabulary").read_text().splitlines()
        made = House(gateway, keys, [line.split()[0] for line in lines], random.Random(5))
        # both workers' tokenizers are known
        wait_until(lambda: made.ask("open-a", made.prompt()).headers["x-cairn-reason"] in ("hit", "cold"), 60)
        yield made


def cached(reply: httpx.Response) -> int:
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def expected(reply: httpx.Response) -> int:
    return int(reply.headers["x-cairn-expected-hit-tokens"])


def known(house: House, tenant: str, prompt: str) -> None:
    """Ask until the gateway expects the prompt in a cache: the index has heard."""
    wait_until(lambda: expected(house.ask(tenant, prompt)) > 0)


def test_what_another_tenant_asked_is_in_no_answer_and_no_header(house: House) -> None:
    prompt = house.prompt()
    known(house, "a", prompt)
    fresh, theirs = house.ask("b", house.prompt()), house.ask("b", prompt)
    assert (cached(theirs), expected(theirs)) == (0, 0)
    told = [
        {name: value for name, value in reply.headers.items() if name.startswith("x-cairn-")}
        for reply in (fresh, theirs)
    ]
    assert told[0] == told[1] != {}
    known(house, "b", prompt)  # its own
    assert cached(house.ask("b", prompt)) > 0


def test_without_isolation_the_same_questions_are_answered(house: House) -> None:
    prompt = house.prompt()
    known(house, "open-a", prompt)
    assert expected(house.ask("open-b", prompt)) > 0
    assert cached(house.ask("open-b", prompt)) > 0
    assert cached(house.ask("b", prompt)) == 0


def first_byte(caller: socket.socket, key: str, prompt: str) -> float:
    """Seconds to the first byte of a streamed answer on a connection that is kept."""
    body = json.dumps({"model": "mock", "prompt": " " + prompt, "max_tokens": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    caller.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    began = time.perf_counter()
    said = caller.recv(1 << 16)
    seconds = time.perf_counter() - began
    assert said.startswith(b"HTTP/1.1 200")
    while not said.endswith(b"0\r\n\r\n"):
        said += caller.recv(1 << 16)
    return seconds


def chance(differences: list[float], rng: np.random.Generator) -> float:
    """Two-sided p of a paired permutation test (Fisher): Wilcoxon's signed ranks under random signs."""
    values = np.array(differences)
    ranks = np.argsort(np.argsort(np.abs(values))) + 1.0
    seen = abs(float(np.sum(np.sign(values) * ranks)))
    signs = rng.choice((-1.0, 1.0), size=(SHUFFLES, len(values)))
    return float((np.sum(np.abs(signs @ ranks) >= seen) + 1) / (SHUFFLES + 1))


def difference(house: House, asker: str, other: str, pairs: int) -> float:
    """p that prompts `other` has asked are as quick for `asker` as prompts nobody has."""
    found = []
    with house.gateway.connect() as theirs, house.gateway.connect() as ours:
        for _ in range(pairs):
            asked, fresh = house.prompt(), house.prompt()
            first_byte(theirs, house.keys[other], asked)
            order = [asked, fresh]
            house.rng.shuffle(order)
            seconds = {prompt: first_byte(ours, house.keys[asker], prompt) for prompt in order}
            found.append(seconds[asked] - seconds[fresh])
    return chance(found, np.random.default_rng(3))


def test_time_does_not_tell_what_another_tenant_asked(house: House) -> None:
    """A leak shows every time; chance, once in a hundred, does not come three times in a row."""
    seen = []
    for _ in range(3):
        seen.append(difference(house, "b", "a", PAIRS))
        if seen[-1] > SURE:
            break
    print(f"p: {seen}, {PAIRS} pairs each")
    assert seen[-1] > SURE


def test_without_isolation_time_does_tell(house: House) -> None:
    p = difference(house, "open-b", "open-a", PAIRS // 4)
    print(f"p: {p}")
    assert p < SURE


# -- keys and models


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[tuple[FakeVLLM, Gateway, Callable[..., str]]]:
    worker, file = FakeVLLM(adapters=["other"]), tmp_path / "keys.yaml"
    where = ("--file", str(file))
    create(where, "--tenant", "first")
    with serve(worker) as url, started(tmp_path, f"fake={url}", auth="keys", keys_file=str(file)) as gateway:
        yield worker, gateway, lambda *flags: create(where, *flags)


def post(gateway: Gateway, body: Any, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"http://127.0.0.1:{gateway.port}{path}",
        content=content,
        headers=headers,
        timeout=30,
        trust_env=False,
    )


def test_nobody_learns_from_a_refusal_which_keys_or_models_there_are(asked: Any) -> None:
    worker, gateway, make = asked
    narrow = make("--tenant", "narrow", "--models", "fake")
    wait_until(lambda: post(gateway, {"prompt": "x"}, authorization=f"Bearer {narrow}").status_code == 200)
    worker.asked.clear()
    stale = make("--tenant", "narrow", "--expires", "1s")
    time.sleep(2.5)  # it has been read, and is over
    keys = ["x", "cairn-" + "A" * 43, narrow[:-1] + ("A" if narrow[-1] != "A" else "B"), stale, narrow + " x"]
    told = [post(gateway, {"model": "fake", "prompt": "x"}, authorization=f"Bearer {key}") for key in keys]
    assert {reply.status_code for reply in told} == {401}
    assert len({reply.text for reply in told}) == 1
    assert not any(key in reply.text for key, reply in zip(keys, told, strict=True) if len(key) > 1)
    assert {json.dumps(sorted(reply.headers.keys())) for reply in told} == {
        json.dumps(sorted(told[0].headers.keys()))
    }
    mine = {"authorization": f"Bearer {narrow}"}
    models = ["other", "nonsense"]  # one that is served to others, one that is not
    refused = [post(gateway, {"model": model, "prompt": "x"}, **mine) for model in models]
    assert {reply.status_code for reply in refused} == {404}
    texts = {reply.text.replace(model, "?") for model, reply in zip(models, refused, strict=True)}
    assert len(texts) == 1
    listed = httpx.get(f"http://127.0.0.1:{gateway.port}/v1/models", headers=mine, trust_env=False).json()
    assert [model["id"] for model in listed["data"]] == ["fake"]
    assert worker.asked == []
    log = gateway.log.read_text()
    assert not any(key in log for key in keys[1:])


def test_a_salt_cannot_be_smuggled_past_the_one_of_the_tenant(asked: Any) -> None:
    """Named twice, escaped, nested, or copied from what another tenant's worker has heard."""
    worker, gateway, make = asked
    keys = [make("--tenant", name, "--isolate") for name in ("a", "b")]
    ok = {"authorization": f"Bearer {keys[0]}"}
    wait_until(lambda: post(gateway, {"prompt": "x"}, **ok).status_code == 200)
    wait_until(lambda: post(gateway, {"prompt": "x"}, authorization=f"Bearer {keys[1]}").status_code == 200)
    worker.asked.clear()
    post(gateway, {"prompt": "x"}, **ok)
    (_, sent), *_ = worker.asked
    theirs = json.loads(sent)["cache_salt"]
    bodies = [
        b'{"prompt": "x", "cache_salt": "%b"}' % theirs.encode(),
        b'{"prompt": "x", "cache_salt": "a", "cache_salt": "%b"}' % theirs.encode(),
        b'{"cache_salt": "%b", "prompt": "x", "cache\\u005fsalt": "%b"}' % (theirs.encode(), theirs.encode()),
        b'{"prompt": "x", "cache_salt": null, "x": {"cache_salt": "%b"}}' % theirs.encode(),
        b'{"prompt": "x", "cache_salt": ""}',
        b'{"prompt": "x"}',
    ]
    for body in bodies:
        worker.asked.clear()
        assert post(gateway, body, authorization=f"Bearer {keys[1]}").status_code == 200
        ((_, sent),) = worker.asked
        salt = json.loads(sent)["cache_salt"]
        assert len(salt) == 64
        assert salt != theirs
        assert (
            json.loads(sent, object_pairs_hook=lambda pairs: [n for n, _ in pairs]).count("cache_salt") == 1
        )
