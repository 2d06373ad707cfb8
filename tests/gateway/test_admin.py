"""The operators' pages, aliases and adapters, on real sockets."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cacheengine.index_schema import FLEET, HOST, WorkerInfo, chunk_name, field_of, lease_name
from cacheengine.keys import KeyScheme, namespace_of, probe_keys
from gateway.app import create_app
from gateway.ask import Ask
from gateway.config import GatewayConfig
from gateway.tokenize import ModelTokenizer
from tests.conftest import ValkeyServer
from tests.fakes import FakeVLLM, serve, wait_until

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}
EXPLAIN = "/admin/route/explain"


@contextlib.contextmanager
def gateway(*urls: str, **knobs: Any) -> Iterator[httpx.Client]:
    config = GatewayConfig(workers=[f"fake={url}" for url in urls], **knobs)
    with serve(create_app(config)) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


@dataclass
class Pair:
    """A gateway in front of two workers, and their ids."""

    client: httpx.Client
    one: FakeVLLM
    two: FakeVLLM
    names: list[str]

    def order(self, what: str, which: int) -> httpx.Response:
        return self.client.post(f"/admin/workers/{self.names[which]}/{what}")

    def state(self, which: int) -> str | None:
        rows = self.client.get("/admin/workers").json()["workers"]
        return next((row["state"] for row in rows if row["id"] == self.names[which]), None)


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, two = FakeVLLM(), FakeVLLM()
    with serve(one) as a, serve(two) as b, gateway(a, b, aliases=["gpt=fake", "ghost=nobody"]) as client:
        yield Pair(client, one, two, [url.removeprefix("http://") for url in (a, b)])


def test_a_drained_worker_finishes_what_it_has_and_gets_nothing_new(pair: Pair) -> None:
    pair.order("drain", 1)
    pair.one.gap, pair.one.tokens = 0.01, 100_000
    with pair.client.stream("POST", CHAT, json=STREAM) as held:
        words = held.iter_raw()
        next(words)
        assert pair.order("resume", 1).json() == {"worker": pair.names[1], "order": "resume"}
        assert pair.order("drain", 0).status_code == 200
        assert (pair.state(0), pair.state(1)) == ("draining", "ready")
        for _ in range(5):
            assert pair.client.post(CHAT, json=BODY).status_code == 200
        assert len(pair.one.asked) == pair.one.running == 1
        next(words)
    wait_until(lambda: pair.state(0) == "drained")
    assert pair.order("drain", 1).status_code == 200
    assert pair.client.post(CHAT, json=BODY).status_code == 503
    assert pair.client.get("/health/ready").status_code == 503
    assert len(pair.two.asked) == 5


def test_a_removed_worker_is_not_even_listed(pair: Pair) -> None:
    assert pair.client.delete(f"/admin/workers/{pair.names[0]}").json()["order"] == "remove"
    assert pair.state(0) is None
    assert pair.client.get("/admin/workers").json()["removed"] == pair.names[:1]
    for _ in range(4):
        assert pair.client.post(CHAT, json=BODY).status_code == 200
    assert pair.one.asked == []
    pair.order("resume", 0)
    wait_until(lambda: pair.state(0) == "ready")


@pytest.mark.parametrize("worker_id", ["nobody", "a/b:1", "[::1]:8000", "%20"])
def test_an_order_about_nobody_is_a_404_in_openais_shape(pair: Pair, worker_id: str) -> None:
    for reply in (
        pair.client.post(f"/admin/workers/{worker_id}/drain"),
        pair.client.post(f"/admin/workers/{worker_id}/resume"),
        pair.client.delete(f"/admin/workers/{worker_id}"),
    ):
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "not_found"


def test_explaining_sends_nothing_and_says_where_the_request_then_goes(pair: Pair) -> None:
    for body in (BODY, {"model": "fake", "prompt": "x"}, {**BODY, "model": "gpt"}):
        said = pair.client.post(EXPLAIN, json=body).json()
        assert (said["blind"], said["unkeyed"], said["actual_hit_tokens"]) == ("no_index", "no_scheme", None)
        assert {row["worker"] for row in said["workers"]} == set(pair.names)
        for row in said["workers"]:
            assert row["total_ms"] == pytest.approx(sum(row["terms_ms"].values()), abs=0.01)
        assert pair.one.asked == pair.two.asked == []
    path = CHAT
    chosen = pair.client.post(path, json={**BODY, "model": "gpt"}, headers={"x-cairn-explain": "1"})
    assert chosen.headers["x-cairn-worker"] == said["worker"]
    assert len(pair.client.get("/admin/decisions").json()["decisions"]) == 1


def test_what_cannot_be_explained_is_refused_like_the_request_itself(pair: Pair) -> None:
    replies = [
        pair.client.post(EXPLAIN, content=b"{"),
        pair.client.post(EXPLAIN, json={**BODY, "model": "other"}),
        pair.client.post(EXPLAIN, json={**BODY, "model": "ghost"}),
        pair.client.post(EXPLAIN, content=b"x" * (17 << 20)),
    ]
    assert [reply.status_code for reply in replies] == [400, 404, 503, 413]
    assert all(reply.json()["error"]["message"] for reply in replies)


def test_who_leaves_in_the_middle_of_asking_is_no_error() -> None:
    """What comes out of the application is a traceback in the log."""
    asked = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    said: list[Any] = []

    async def receive() -> Any:
        return next(asked)

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": EXPLAIN, "query_string": b"", "headers": []}
    asyncio.run(create_app(GatewayConfig())(scope, receive, send))  # type: ignore[arg-type]
    assert said[0]["status"] == 499


def test_an_alias_reaches_the_worker_under_the_models_name(pair: Pair) -> None:
    assert pair.client.post(CHAT, json={**BODY, "model": "gpt", "seed": 7}).status_code == 200
    ((_, body),) = pair.one.asked + pair.two.asked
    assert json.loads(body) == {**BODY, "seed": 7}
    names = [card["id"] for card in pair.client.get("/v1/models").json()["data"]]
    assert names == ["fake", "gpt"]  # nobody serves what `ghost` means
    assert pair.client.post(CHAT, json={**BODY, "model": "ghost"}).status_code == 503


def test_a_request_for_an_adapter_goes_where_it_is(pair: Pair) -> None:
    pair.two.adapters = ["fr"]
    assert pair.client.post(CHAT, json={**BODY, "model": "fr"}).status_code == 404
    with gateway(*(f"http://{name}" for name in pair.names)) as client:
        wait_until(lambda: "fr" in client.get("/v1/models").text)
        for _ in range(6):
            assert client.post(CHAT, json={**BODY, "model": "fr"}).status_code == 200
    assert len(pair.two.asked) == 6


def test_a_worker_that_never_has_what_the_index_says_is_stale_for_all_to_see(
    valkey: ValkeyServer, smollm: ModelTokenizer, smollm_path: Path
) -> None:
    scheme = KeyScheme(namespace_of({"model": "m"}), 16)
    ids = list(range(1000, 1100))
    keys = scheme.keys(ids)

    def encode(body: dict[str, Any]) -> list[int]:
        asked = {name: body[name] for name in ("messages", "prompt") if name in body}
        return smollm.tokens(Ask(**asked), "messages" in asked).ids

    worker = FakeVLLM(encode=encode, adapters=["fr"])
    with serve(worker) as url:
        info = WorkerInfo(
            "w1", url, "fake", str(smollm_path), scheme.namespace.hex(), 16, tuple(probe_keys(scheme)),
            payload_bytes=16 * 1000, tiers=("device", "host"), boot_id="1", epoch=3,
        )  # fmt: skip
        with valkey.client() as redis:
            redis.hset(lease_name(info.namespace, "w1"), mapping=info.fields() | {"prefill_rate": "1000"})
            redis.zadd(FLEET, {f"{info.namespace}:w1": 1})
            for key in keys:
                redis.hset(chunk_name(scheme.namespace, keys[0], key), field_of("w1", 3), HOST)
        body = {"model": "fake", "prompt": ids}
        with gateway(redis_url=valkey.url, index_deadline_ms=1000) as client:

            def explained(model: str = "fake") -> dict[str, Any]:
                said: dict[str, Any] = client.post(EXPLAIN, json={**body, "model": model}).json()
                return said

            wait_until(lambda: explained().get("unkeyed") == "")
            assert explained()["expected_hit_tokens"] == 96
            wait_until(lambda: explained("fr").get("unkeyed") == "")
            adapter = explained("fr")
            assert (adapter["chunks"], adapter["expected_hit_tokens"]) == (6, 0)  # names of its own
            for _ in range(3):
                client.post("/v1/completions", json=body)
            assert explained()["workers"][0]["trust"]["local"] == {"state": "STALE", "precision": 0.0}
            (row,) = client.get("/admin/workers").json()["workers"]
            assert row["trust"]["local"]["state"] == "STALE"
            metrics = client.get("/metrics").text
            assert 'cairn_router_trust{part="local",state="STALE",worker="w1"} 1.0' in metrics
            assert 'cairn_router_predicted_hit_tokens_total{worker="w1"} 288.0' in metrics
            assert 'cairn_router_hit_precision_bucket{le="0.0"} 3.0' in metrics
            assert client.get("/admin/decisions").json()["decisions"][0]["actual_hit_tokens"] == 0
            worker.cached_tokens = 96
            for _ in range(15):
                client.post("/v1/completions", json=body)
            assert explained()["workers"][0]["trust"]["local"]["state"] == "EXACT"
            metrics = client.get("/metrics").text
            assert 'cairn_router_actual_hit_tokens_total{worker="w1"} 1440.0' in metrics
