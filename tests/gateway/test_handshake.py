"""Workers that register in a real Valkey, and what the gateway makes of how they name and tokenize."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cacheengine.index_schema import HOST, Entry, WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, Namespace, probe_keys
from gateway.app import create_app
from gateway.ask import Ask
from gateway.config import GatewayConfig
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.test_app import CHAT, metric

SCHEME = KeyScheme(Namespace(b"n" * 16), 16)
MESSAGES = [{"role": "user", "content": "What does a cairn mark? " * 10}]


@contextlib.contextmanager
def registered(
    valkey: Any, worker: FakeVLLM, folder: Path, entries: list[Entry], probes: list[str] | None = None
) -> Iterator[str]:
    """`worker` on a socket, with a lease in Valkey and `entries` in the index; yields its id."""
    with serve(worker) as url:
        name = url.removeprefix("http://")
        info = WorkerInfo(
            name, url, "fake", str(folder), SCHEME.namespace.hex(), SCHEME.chunk_tokens,
            probe_keys=tuple(probe_keys(SCHEME) if probes is None else probes),
            payload_bytes=1, tiers=("host",),
        )  # fmt: skip
        writer = IndexWriter(valkey.url, info, 60, 6, lambda: {}, lambda: entries)
        writer.start()
        try:
            wait_until(lambda: writer.stats.announcements)
            yield name
        finally:
            writer.close()


@contextlib.contextmanager
def gateway(valkey: Any) -> Iterator[httpx.Client]:
    config = GatewayConfig(redis_url=valkey.url, index_deadline_ms=1000)
    with serve(create_app(config)) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


def encoding(tokenizer: ModelTokenizer, add: list[int]) -> Any:
    """A worker's /tokenize that answers as `tokenizer` does, plus `add`."""

    def encode(body: dict[str, Any]) -> list[int]:
        ask = Ask(messages=body.get("messages"), prompt=body.get("prompt"))
        return tokenizer.tokens(ask, "messages" in body).ids + add

    return encode


def held(keys: list[ChunkKey]) -> list[Entry]:
    return [Entry(keys[0], key, HOST) for key in keys]


def explained(client: httpx.Client, **more: Any) -> httpx.Headers:
    body = {"model": "fake", "messages": MESSAGES, **more}
    reply = client.post(CHAT, json=body, headers={"x-cairn-explain": "1"})
    assert reply.status_code == 200
    return reply.headers


def trusted(client: httpx.Client) -> list[bool]:
    return [row["trusted"] for row in client.get("/admin/workers").json()["workers"]]


def test_a_prompt_goes_to_the_worker_that_holds_it(
    valkey: Any, smollm: ModelTokenizer, smollm_path: Path
) -> None:
    keys = SCHEME.keys(smollm.chat(Ask(messages=MESSAGES)).ids)
    same = encoding(smollm, [])
    with (
        registered(valkey, FakeVLLM(encode=same), smollm_path, []),
        registered(valkey, FakeVLLM(encode=same), smollm_path, held(keys)) as holder,
        registered(valkey, FakeVLLM(encode=same), smollm_path, []),
        gateway(valkey) as client,
    ):
        wait_until(lambda: explained(client)["x-cairn-reason"] == "hit")
        for _ in range(5):
            headers = explained(client)
            assert headers["x-cairn-worker"] == holder
            assert int(headers["x-cairn-expected-hit-tokens"]) == len(keys) * 16
        assert trusted(client) == [True] * 3
        assert metric(client, "cairn_handshake_mismatch_total") == 0
        assert explained(client, cache_salt="other tenant")["x-cairn-reason"] == "cold"


def test_a_picture_is_routed_without_keys_and_is_no_error(
    valkey: Any, smollm: ModelTokenizer, smollm_path: Path
) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
    with (
        registered(valkey, FakeVLLM(encode=encoding(smollm, [])), smollm_path, []),
        gateway(valkey) as client,
    ):
        wait_until(lambda: explained(client)["x-cairn-reason"] != "no_keys")
        assert explained(client, messages=picture)["x-cairn-reason"] == "no_keys"
        assert metric(client, 'cairn_gateway_unkeyed_requests_total{reason="multimodal"}') == 1


def test_a_worker_that_tokenizes_unlike_us_is_never_counted_on(
    valkey: Any, smollm: ModelTokenizer, smollm_path: Path
) -> None:
    keys = SCHEME.keys(smollm.chat(Ask(messages=MESSAGES)).ids)
    odd = FakeVLLM(encode=encoding(smollm, [7]))
    with registered(valkey, odd, smollm_path, held(keys)), gateway(valkey) as client:
        wait_until(lambda: trusted(client) == [False])
        assert explained(client)["x-cairn-expected-hit-tokens"] == "0"
        assert metric(client, 'cairn_handshake_mismatch_total{kind="tokens"}') == 1


def test_a_worker_that_names_chunks_unlike_us_is_never_counted_on(
    valkey: Any, smollm: ModelTokenizer, smollm_path: Path
) -> None:
    worker = FakeVLLM(encode=encoding(smollm, []))
    with registered(valkey, worker, smollm_path, [], probes=["00" * 16]), gateway(valkey) as client:
        wait_until(lambda: metric(client, 'cairn_handshake_mismatch_total{kind="keys"}') == 1)
        assert explained(client)["x-cairn-reason"] == "no_keys"


def test_a_model_without_a_readable_tokenizer_is_served_without_keys(valkey: Any, tmp_path: Path) -> None:
    with registered(valkey, FakeVLLM(), tmp_path, []), gateway(valkey) as client:
        wait_until(lambda: metric(client, 'cairn_handshake_mismatch_total{kind="no_tokenizer"}') == 1)
        assert explained(client)["x-cairn-reason"] == "no_keys"


def test_requests_are_answered_while_redis_is_away(
    valkey: Any, smollm: ModelTokenizer, smollm_path: Path
) -> None:
    worker = FakeVLLM(encode=encoding(smollm, []))
    with registered(valkey, worker, smollm_path, []), gateway(valkey) as client:
        wait_until(lambda: explained(client)["x-cairn-reason"] != "no_keys")
        valkey.kill()
        wait_until(lambda: explained(client)["x-cairn-reason"] == "index_down")
        assert metric(client, "cairn_index_down_total") >= 1
        valkey.start()
        wait_until(lambda: explained(client)["x-cairn-reason"] in ("hit", "cold"))


def test_the_fake_speaks_the_dialect_it_is_asked_in(smollm: ModelTokenizer) -> None:
    with serve(FakeVLLM(encode=encoding(smollm, []))) as url:
        reply = httpx.post(url + "/tokenize", content=json.dumps({"prompt": "a b"}), trust_env=False)
    assert reply.json()["tokens"] == smollm.tokens(Ask(prompt="a b"), False).ids


def test_an_unreadable_chat_raises_only_what_the_handshake_expects(smollm: ModelTokenizer) -> None:
    with pytest.raises(Unkeyable):
        smollm.tokens(Ask(messages="not a list"), True)


def test_a_gateway_runs_while_no_node_of_its_cluster_answers():
    app = create_app(GatewayConfig(redis_url="redis-cluster://127.0.0.1:1"))
    with serve(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/admin/workers").status_code == 200
