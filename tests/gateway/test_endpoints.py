"""Every path of the surface, on real sockets, in front of a worker that writes down what reaches it."""

import contextlib
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.endpoints import ENDPOINTS, other
from tests.fakes import serve, wait_until

pytestmark = pytest.mark.e2e

JSON_PATHS = [path for path, endpoint in ENDPOINTS.items() if endpoint.body == "json"]
AUDIO = "/v1/audio/transcriptions"
# vLLM 0.32's routes for its operators, and ways to write them that something on the way might tidy up
CONTROLS = [
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/sleep", "/wake_up", "/collective_rpc",
    "/start_profile", "/stop_profile", "/scale_elastic_ep", "/fault_tolerance/apply", "/pause", "/resume",
    "/abort_requests", "/inference/v1/abort_requests", "/update_weights", "/init_weight_transfer_engine",
    "/release_kv_cache_memory", "/invocations", "/ping", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
    "/v1/load_lora_adapter/", "/v1//load_lora_adapter", "/v1/../sleep", "/v1/%2e%2e/sleep", "/v1/..%2fsleep",
    "/v1/x/../../sleep", "/v1/x%2f..%2f..%2fsleep", "/v1/./load_lora_adapter", "/v1/load_lora_adapter%3fx",
    "/v1/load%5flora%5fadapter", "/v1\\sleep", "/v1/load_lora_adapter;x", "/v1/x%0d%0ay",
    "/v1/load_lora_adapter%00",
]  # fmt: skip


class Scribe:
    """A worker that serves everything, and remembers path, headers, length and digest of what it got."""

    def __init__(self, *cards: dict[str, Any], keep: bool = True) -> None:
        self.cards, self.keep = cards or ({"id": "fake"},), keep
        self.heard: list[tuple[str, bytes]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.digests: list[tuple[int, str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            return
        body, size, digest, more = b"", 0, hashlib.sha256(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            digest.update(part)
            body += part if self.keep else b""
        answer: dict[str, Any] = {"ok": True}
        if scope["path"] == "/v1/models":
            answer = {"object": "list", "data": self.cards}
        elif scope["path"] != "/health":
            self.heard.append((scope["raw_path"].decode(), body))
            self.headers.append(dict(scope["headers"]))
            self.digests.append((size, digest.hexdigest()))
        said = json.dumps(answer).encode()
        head = [(b"content-type", b"application/json"), (b"x-request-id", b"the-worker's")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": said})


@contextlib.contextmanager
def gateway(*workers: str, **knobs: Any) -> Iterator[httpx.Client]:
    config = GatewayConfig(workers=list(workers), **knobs)
    with serve(create_app(config)) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Scribe, httpx.Client]]:
    scribe = Scribe()
    with serve(scribe) as url, gateway(f"fake={url}") as client:
        yield scribe, client


@pytest.fixture
def scribe(house: tuple[Scribe, httpx.Client]) -> Scribe:
    house[0].heard, house[0].headers, house[0].digests = [], [], []
    return house[0]


@pytest.fixture
def client(house: tuple[Scribe, httpx.Client], scribe: Scribe) -> httpx.Client:
    return house[1]


def test_every_path_of_the_table_brings_its_bytes_to_the_worker(client: httpx.Client, scribe: Scribe) -> None:
    body = b'{ "model":"fake",  "\\u0061": 1e3 }'
    for path in JSON_PATHS:
        assert client.post(path, content=body).json() == {"ok": True}, path
    assert scribe.heard == [(path, body) for path in JSON_PATHS]


def test_the_table_has_every_inference_route_of_vllm() -> None:
    """Its sources, not a running server: routes are registered by what a model can do."""
    vllm = pytest.importorskip("vllm", reason="NO VLLM: install the `cpu` extra")
    entrypoints = Path(vllm.__file__).parent / "entrypoints"
    found = set()
    for source in entrypoints.rglob("*.py"):
        found |= set(re.findall(r'@router\.post\(\s*"([^"]+)"', source.read_text()))
    found = {path for path in found if "{" not in path}
    ours = {path for path in found if path in ENDPOINTS or other(path)}
    assert "/v1/chat/completions" in ours
    operators = {path for path in CONTROLS if path in found} | {
        "/is_scaling_elastic_ep", "/shutdown_weight_transfer_engine", "/start_weight_update",
        "/start_draft_weight_update", "/finish_weight_update", "/update_weight_version", "/weight_checker",
    }  # fmt: skip
    assert found - ours == operators


@pytest.mark.parametrize("path", CONTROLS)
def test_a_workers_own_controls_are_out_of_reach(client: httpx.Client, scribe: Scribe, path: str) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as plain:
        body = b'{"model": "fake"}'
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        plain.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: plain.recv(65536), b""))
    assert answer.split()[1] in (b"400", b"404", b"405", b"307"), answer[:200]
    assert scribe.heard == []


def test_an_unknown_path_goes_to_the_worker_of_its_model() -> None:
    one, two = Scribe(), Scribe()
    with serve(one) as a, serve(two) as b, gateway(f"one={a}", f"two={b}") as client:
        for model in ("two", "one", "two"):
            assert client.post("/v1/brand/new", json={"model": model}).status_code == 200
        assert client.post("/v1/brand/new", json={}).json()["error"]["param"] == "model"
        assert client.post("/v1/brand/new", json={"model": "three"}).status_code == 404
        assert client.post("/v1/brand/new", content=b"not json").status_code == 400
        assert client.get("/v1/brand/new").status_code == 404
    assert [path for path, _ in one.heard] == ["/v1/brand/new"]
    assert [path for path, _ in two.heard] == ["/v1/brand/new"] * 2


def test_an_unknown_path_without_a_model_goes_to_the_only_one(client: httpx.Client, scribe: Scribe) -> None:
    assert client.post("/v1/systemone", json={"x": 1}).status_code == 200
    assert len(scribe.heard) == 1


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_paths_are_refused_in_anthropics_words(client: httpx.Client, path: str) -> None:
    unknown = client.post(path, json={"model": "other", "messages": []})
    assert unknown.status_code == 404
    assert unknown.json()["type"] == "error"
    assert unknown.json()["error"]["type"] == "not_found_error"
    assert "does not exist" in unknown.json()["error"]["message"]
    assert client.post(path, content=b"[").json()["error"]["type"] == "invalid_request_error"
    assert client.get(path).json()["type"] == "error"


def test_responses_are_not_kept_and_it_says_so(client: httpx.Client, scribe: Scribe) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        reply = client.request(method, f"/v1/responses/resp_1{path}")
        assert reply.status_code == 404
        assert reply.json()["error"]["message"] == "Responses are not kept here."
    follow = client.post("/v1/responses", json={"model": "fake", "input": "x", "previous_response_id": "r"})
    assert follow.status_code == 400
    assert follow.json()["error"]["param"] == "previous_response_id"
    behind = client.post("/v1/responses", json={"model": "fake", "input": "x", "background": True})
    assert behind.json()["error"]["param"] == "background"
    assert scribe.heard == []


def test_models_are_merged_with_what_their_workers_say_of_them() -> None:
    base = {"id": "base", "root": "/models/base", "max_model_len": 4096, "parent": None}
    tuned = {"id": "tuned", "root": "/adapters/tuned", "parent": "base"}
    with (
        serve(Scribe(base, tuned)) as a,
        serve(Scribe({**base, "max_model_len": 2048})) as b,
        serve(Scribe({"id": "org/other"})) as c,
        gateway(f"base={a}", f"base={b}", f"org/other={c}", aliases=["gpt=base"]) as client,
    ):
        wait_until(lambda: len(client.get("/v1/models").json()["data"]) == 4)
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert {card["object"] for card in cards.values()} == {"model"}
        assert cards["base"]["max_model_len"] == 2048
        assert cards["base"]["root"] == "/models/base"
        assert cards["tuned"]["parent"] == "base"
        assert cards["gpt"] == {**cards["base"], "id": "gpt"}
        assert client.get("/v1/models/org/other").json() == cards["org/other"]
        missing = client.get("/v1/models/none")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


def test_the_request_id_is_the_callers_everywhere(client: httpx.Client, scribe: Scribe) -> None:
    named = {"x-request-id": "mine-7"}
    for reply in (
        client.post("/v1/chat/completions", json={"model": "fake"}, headers=named),
        client.post("/v1/chat/completions", content=b"[", headers=named),
        client.get("/v1/nothing", headers=named),
        client.get("/v1/models", headers=named),
        client.get("/metrics", headers=named),
    ):
        assert reply.headers.get_list("x-request-id") == ["mine-7"]
    assert scribe.headers[0][b"x-request-id"] == b"mine-7"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "<script>", "ü"])
def test_a_request_id_that_is_missing_or_unfit_is_made(
    client: httpx.Client, scribe: Scribe, given: str | None
) -> None:
    headers = {} if given is None else {"x-request-id": given.encode()}
    made = client.post("/v1/completions", json={"model": "fake"}, headers=headers).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert scribe.headers[0][b"x-request-id"].decode() == made


def test_browsers_of_listed_origins_may_call_the_api_but_not_the_operators_pages() -> None:
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with serve(Scribe()) as url, gateway(f"fake={url}", cors_origins=["https://app.example"]) as client:
        preflight = client.options("/v1/chat/completions", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        for reply in (
            client.post("/v1/completions", json={"model": "fake"}, headers=asks),
            client.post("/v1/completions", content=b"[", headers=asks),
            client.get("/v1/nothing", headers=asks),
        ):
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
        stranger = client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert "access-control-allow-origin" not in client.get("/admin/workers", headers=asks).headers


def test_without_origins_there_is_no_cors(client: httpx.Client) -> None:
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert client.options("/v1/chat/completions", headers=asks).status_code == 405
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=asks).headers


def test_the_openapi_page_lists_what_is_relayed(client: httpx.Client) -> None:
    page = client.get("/openapi.json").json()
    assert set(ENDPOINTS) < set(page["paths"])
    chat = page["paths"]["/v1/chat/completions"]["post"]
    assert "messages" in chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    audio = page["paths"][AUDIO]["post"]["requestBody"]["content"]
    assert audio["multipart/form-data"]["schema"]["properties"]["file"]["format"] == "binary"
    assert "/v1/models" in page["paths"]
    assert client.get("/docs").status_code == 200
