"""Keys and limits on real sockets: official client, gateway, worker, and a real Valkey where it is shared."""

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from gateway.app import create_app
from gateway.cli import app as cli
from gateway.config import GatewayConfig
from gateway.limits_redis import GATEWAYS
from tests.conftest import ValkeyServer
from tests.fakes import FakeVLLM, serve, wait_until

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
PATIENT = 5000.0  # ms for Redis: a slow machine is not a Redis that is away


def cairn(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(args))
    assert done.exit_code == code, done.output
    return done.stdout


def create(where: tuple[str, str], *flags: str) -> str:
    return cairn("keys", "create", *where, *flags).strip()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextlib.contextmanager
def gateway(worker: str, **knobs: Any) -> Iterator[httpx.Client]:
    config = GatewayConfig(
        **{"workers": [f"fake={worker}"], "auth": "keys", "index_deadline_ms": PATIENT, **knobs}
    )
    with serve(create_app(config)) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def worker() -> FakeVLLM:
    return FakeVLLM(adapters=["other"])


@pytest.fixture
def worker_url(worker: FakeVLLM) -> Iterator[str]:
    with serve(worker) as url:
        yield url


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def where(keys_file: Path) -> tuple[str, str]:
    return "--file", str(keys_file)


def sdk(client: httpx.Client, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0)


def chat(sdk: openai.OpenAI, **more: Any) -> Any:
    return sdk.chat.completions.create(**{**BODY, **more})


def usage(client: httpx.Client) -> dict[str, Any]:
    """Of the only tenant; zeros before its first request is over."""
    rows = client.get("/admin/tenants").json()["tenants"]
    return rows[0] if rows else {"requests": 0, "completion_tokens": 0}


def test_each_refusal_is_its_own_exception_in_the_official_client(
    where, worker, worker_url, keys_file
) -> None:
    good = create(where, "--tenant", "a", "--rpm", "2", "--models", "fake")
    expired = create(where, "--tenant", "a", "--expires", "0s")
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        for wrong in ("cairn-wrong", expired, "none"):
            with sdk(client, wrong) as stranger, pytest.raises(openai.AuthenticationError) as refused:
                chat(stranger)
            assert refused.value.code == "invalid_api_key"
            assert refused.value.response.headers["www-authenticate"] == "Bearer"
        with sdk(client, good) as known:
            assert [model.id for model in known.models.list()] == ["fake"]
            with pytest.raises(openai.NotFoundError) as hidden:
                chat(known, model="other")
            with pytest.raises(openai.NotFoundError) as missing:
                chat(known, model="ether")
            assert hidden.value.code == missing.value.code == "model_not_found"
            assert str(hidden.value).replace("other", "ether") == str(missing.value)
            chat(known)
            chat(known)
            with pytest.raises(openai.RateLimitError) as late:
                chat(known)
            assert (late.value.code, late.value.type) == ("rate_limit_exceeded", "requests")
            assert 1 <= int(late.value.response.headers["retry-after"]) <= 30
            assert late.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(worker.asked) == 2


def test_anthropic_s_header_is_a_key_too_and_no_key_reaches_the_worker(where, worker, worker_url, keys_file):
    key = create(where, "--tenant", "a")
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        assert client.post(CHAT, json=BODY).status_code == 401
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=BODY, headers={"x-api-key": key, "x-kept": "1"}).status_code == 200
        assert client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
    for heard in worker.headers:
        assert not {b"authorization", b"x-api-key"} & heard.keys()
    assert worker.headers[0][b"x-kept"] == b"1"


def test_no_secret_is_told_in_logs_errors_metrics_or_pages(where, worker_url, keys_file, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [create(where, "--tenant", "a", "--rpm", "1", "--isolate"), "cairn-" + "x" * 43]
    said = []
    with gateway(worker_url, keys_file=str(keys_file), admin_token="hush-hush") as client:
        for key in keys * 2:
            said.append(client.post(CHAT, json=BODY, headers=bearer(key)))
        said.append(client.get("/admin/tenants", headers=bearer(keys[0])))
        said.append(client.get("/admin/tenants", headers=bearer("hush-hush")))
        said.append(client.get("/metrics"))
        assert [reply.status_code for reply in said] == [200, 401, 429, 401, 401, 200, 200]
    salt = json.loads(json.dumps(keys_file.read_text())).splitlines()[0].removeprefix("secret: ")
    told = caplog.text + "".join(f"{reply.headers}{reply.text}" for reply in said)
    for secret in (*keys, "hush-hush", salt):
        assert secret not in told
    assert 'cairn_tenant_refusals_total{kind="requests",tenant="a"} 1.0' in said[-1].text
    assert 'cairn_tenant_refusals_total{kind="key",tenant=""} 2.0' in said[-1].text
    assert 'cairn_tenant_tokens_total{kind="completion",tenant="a"} 3.0' in said[-1].text


def test_tokens_are_taken_as_an_estimate_and_settled_with_what_was_used(where, worker_url, keys_file) -> None:
    key = create(where, "--tenant", "a", "--tpm", "100000")
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        taken = client.post(CHAT, json={**BODY, "max_tokens": 90_000}, headers=bearer(key)).headers
        assert int(taken["x-ratelimit-remaining-tokens"]) < 10_000
        assert taken["x-ratelimit-limit-tokens"] == "100000"
        assert taken["x-ratelimit-reset-tokens"].endswith("s")
        assert "x-ratelimit-limit-requests" not in taken
        for _ in range(20):  # at once: what has ended is settled
            again = client.post(CHAT, json={**BODY, "max_tokens": 90_000}, headers=bearer(key))
            assert again.status_code == 200, "3 + 9 tokens were used, not 90,000"
        large = client.post(CHAT, json={**BODY, "max_tokens": 200_000}, headers=bearer(key))
        assert large.status_code == 429
        assert large.headers["x-should-retry"] == "false"
        wait_until(lambda: usage(client)["requests"] == 22, 30)
        row = usage(client)
        assert (row["prompt_tokens"], row["completion_tokens"], row["inflight"]) == (189, 63, 0)
        assert row["refused"] == {"tokens": 1}


def test_comments_in_silence_are_no_tokens(where, worker, worker_url, keys_file) -> None:
    key = create(where, "--tenant", "a")
    worker.gaps, worker.die_after = [0.5], 2
    with gateway(worker_url, keys_file=str(keys_file), keepalive_seconds=0.05) as client:
        said = client.post(CHAT, json={**BODY, "stream": True}, headers=bearer(key)).text
        assert said.count(": keepalive") > 1
        wait_until(lambda: usage(client)["requests"] == 1)
        assert usage(client)["completion_tokens"] == 2


def test_an_error_after_comments_costs_no_tokens(where, worker, worker_url, keys_file) -> None:
    key = create(where, "--tenant", "a")
    with gateway(worker_url, keys_file=str(keys_file), keepalive_seconds=0.05) as client:
        for number, status in enumerate((400, 503), 1):
            worker.pause, worker.status = 0.5, status
            said = client.post(CHAT, json={**BODY, "stream": True}, headers=bearer(key))
            assert said.status_code == 200
            assert said.text.startswith(": keepalive")
            assert "error" in said.text
            wait_until(lambda number=number: usage(client)["requests"] == number, 30)
        assert (usage(client)["prompt_tokens"], usage(client)["completion_tokens"]) == (0, 0)


def test_a_tenant_is_told_why_but_not_who_the_workers_are(where, worker_url, keys_file) -> None:
    key = create(where, "--tenant", "a")
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        told = client.post(CHAT, json=BODY, headers={**bearer(key), "x-cairn-explain": "1"}).headers
        names = {name for name in told if name.startswith("x-cairn-")}
        assert names == {"x-cairn-reason", "x-cairn-policy", "x-cairn-expected-hit-tokens"}


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", 1), ([5, 6], 1), (["a", "b"], 2), ([[5], [6], [7]], 3)]
)
def test_every_prompt_of_a_completion_is_estimated(
    where, worker_url, keys_file, prompt: Any, prompts: int
) -> None:
    key = create(where, "--tenant", "a", "--tpm", "100000")
    body = {"model": "fake", "prompt": prompt, "max_tokens": 5000, "n": 2}
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        taken = client.post("/v1/completions", json=body, headers=bearer(key)).headers
        left = int(taken["x-ratelimit-remaining-tokens"])
        assert left == pytest.approx(100_000 - 10_000 * prompts, abs=100)


def test_a_month_s_budget_is_the_tenant_s_whatever_the_key(where, worker_url, keys_file) -> None:
    keys = [create(where, "--tenant", "a", "--tokens-per-month", "60") for _ in range(2)]
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        for spent in (12, 24):
            assert client.post(CHAT, json=BODY, headers=bearer(keys[0])).status_code == 200
            wait_until(lambda spent=spent: usage(client)["completion_tokens"] == spent / 4, 30)
        with sdk(client, keys[1]) as other, pytest.raises(openai.RateLimitError) as over:
            chat(other, max_tokens=50)
        assert (over.value.code, over.value.type) == ("insufficient_quota", "insufficient_quota")
        assert int(over.value.response.headers["retry-after"]) >= 1


def test_places_come_back_however_a_request_ends(where, worker, worker_url, keys_file) -> None:
    key = create(where, "--tenant", "a", "--concurrency", "1")
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        worker.gap, worker.tokens = 0.01, 100_000
        stream = {**BODY, "stream": True}
        with client.stream("POST", CHAT, json=stream, headers=bearer(key)) as held:
            words = held.iter_raw()  # kept: the stream is closed with it
            next(words)
            refused = client.post(CHAT, json=BODY, headers=bearer(key))
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        worker.gap, worker.tokens = 0.0, 3

        wait_until(lambda: usage(client)["requests"] == 2, 30)
        assert usage(client)["inflight"] == 0
        assert usage(client)["completion_tokens"] >= 1, "the words that were heard before the hang-up"
        for _ in range(10):
            assert client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
        worker.status = 500
        assert client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 500
        worker.status = 200
        assert client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200


@contextlib.contextmanager
def arriving(client: httpx.Client, key: str, length: int = 1000) -> Iterator[socket.socket]:
    """A request of which the head is here, and nothing of the body."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {client.base_url.host}\r\nauthorization: Bearer {key}\r\n"
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=30) as caller:
        caller.sendall(f"{head}content-length: {length}\r\n\r\n".encode())
        yield caller


def test_places_are_counted_before_a_body_is_read(where, worker, worker_url, keys_file) -> None:
    key, other = (create(where, "--tenant", name, "--concurrency", "2") for name in "ab")
    with gateway(worker_url, keys_file=str(keys_file)) as client:

        def answer() -> int:
            return client.post(CHAT, json=BODY, headers=bearer(key)).status_code

        with arriving(client, key), arriving(client, key):
            wait_until(lambda: client.get("/admin/workers").json()["inflight"] == 2, 30)
            with arriving(client, key) as third:
                said = third.recv(65536)
            assert said.startswith(b"HTTP/1.1 429 ")
            assert b"retry-after: 1\r\n" in said
            assert b'"code":"rate_limit_exceeded"' in said
            with sdk(client, key) as full, pytest.raises(openai.RateLimitError) as refused:
                chat(full)
            assert refused.value.type == "requests"
            assert client.post(CHAT, json=BODY, headers=bearer(other)).status_code == 200
        wait_until(lambda: answer() == 200, 30)
        rows = {row["tenant"]: row for row in client.get("/admin/tenants").json()["tenants"]}
        assert rows["a"]["refused"]["concurrency"] >= 2
    assert len(worker.asked) == 2


def test_no_way_out_keeps_a_place(where, worker, worker_url, keys_file) -> None:
    key = create(where, "--tenant", "a", "--concurrency", "1", "--rpm", "1", "--models", "fake")
    with gateway(worker_url, keys_file=str(keys_file), max_body_bytes=10_000) as client:

        def told(**said: Any) -> int:
            return client.post(CHAT, headers=bearer(key), **{"json": BODY, **said}).status_code

        assert told() == 200
        for _ in range(3):
            assert told() == 429, "by the script"
            assert told(json=None, content=b"{") == 400
            assert told(json={**BODY, "model": "other"}) == 404
            assert told(json=None, content=b"x" * 20_000) == 413
            with arriving(client, key):
                wait_until(lambda: client.get("/admin/workers").json()["inflight"] == 1, 30)
            wait_until(lambda: client.get("/admin/workers").json()["inflight"] == 0, 30)
        row = usage(client)
        assert (row["refused"]["requests"], row["refused"].get("concurrency")) == (3, None)


def test_an_isolated_tenant_s_prompts_are_salted_and_its_own_salt_is_only_mixed_in(
    where, worker, worker_url, keys_file
) -> None:
    mine = [create(where, "--tenant", "a", "--isolate") for _ in range(2)]
    theirs = create(where, "--tenant", "b", "--isolate")
    open_to_all = create(where, "--tenant", "c")
    raw = '{ "model":"fake", "cache_salt": "a", "messages" : [],  "unknown": [1e400, "ü"]}'.encode()

    def salt(key: str, body: bytes = json.dumps(BODY).encode()) -> str | None:
        client.post(CHAT, content=body, headers=bearer(key))
        sent = worker.asked[-1][1]
        assert sent.count(b'"cache_salt"') <= 1
        if body is raw:
            assert b'[1e400, "\xc3\xbc"]' in sent
        return json.loads(sent).get("cache_salt")

    with gateway(worker_url, keys_file=str(keys_file)) as client:
        salts = {salt(mine[0]), salt(theirs), salt(mine[0], raw), salt(theirs, raw)}
        assert len(salts) == 4
        assert not salts & {None, "a"}
        assert salt(mine[1]) == salt(mine[0]), "keys of one tenant share"
        assert salt(open_to_all) is None
        assert salt(open_to_all, raw) == "a"
        wrong = client.post(CHAT, json={**BODY, "cache_salt": 1}, headers=bearer(theirs))
        assert wrong.status_code == 400


def test_a_gateway_that_never_read_its_keys_says_later_not_wrong(worker_url, tmp_path) -> None:
    with gateway(worker_url, keys_file=str(tmp_path / "none.yaml")) as client:
        reply = client.post(CHAT, json=BODY, headers=bearer("cairn-any"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "keys_unavailable")


def test_a_file_that_breaks_keeps_the_keys_and_one_that_is_mended_is_read(
    where, worker_url, keys_file
) -> None:
    key = create(where, "--tenant", "a")
    with gateway(worker_url, keys_file=str(keys_file)) as client:
        good = keys_file.read_text()
        for broken in ("keys: [", "keys: [{}]", "keys: &a [*a]", "keys: [1]", "[]"):
            keys_file.write_text(broken)
            assert client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
            time.sleep(1.2)  # it has been read meanwhile
        keys_file.write_text(good)
        cairn("keys", "revoke", json.loads(cairn("keys", "list", *where, "--json"))[0]["id"], *where)
        wait_until(lambda: client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 401, 30)


def test_two_gateways_share_one_limit_and_hear_of_a_revoked_key(worker_url, valkey: ValkeyServer) -> None:
    where = ("--redis-url", valkey.url)
    key = create(where, "--tenant", "a", "--rpm", "6")
    with (
        gateway(worker_url, redis_url=valkey.url) as one,
        gateway(worker_url, redis_url=valkey.url) as two,
    ):
        assert shared(one, two, key)
        said = [each.post(CHAT, json=BODY, headers=bearer(key)) for each in (one, two) * 5]
        passed = [reply.status_code for reply in said].count(200)
        assert 5 <= passed <= 7, "6, and what drains away meanwhile on a slow machine"
        assert {reply.status_code for reply in said} == {200, 429}
        (row,) = json.loads(cairn("keys", "list", *where, "--json"))
        cairn("keys", "revoke", row["id"], *where)
        for each in (one, two):
            wait_until(lambda each=each: each.get("/v1/models", headers=bearer(key)).status_code == 401, 30)
        with valkey.frozen():
            assert one.get("/v1/models", headers=bearer(key)).status_code == 401


def test_while_redis_hangs_each_of_two_gateways_lets_half_of_the_limit_in(
    worker_url, valkey: ValkeyServer
) -> None:
    key = create(("--redis-url", valkey.url), "--tenant", "a", "--rpm", "6")

    def beats() -> dict[bytes, float]:
        with valkey.client() as client:
            return dict(client.zrange(GATEWAYS, 0, -1, withscores=True))

    hasty = {"redis_url": valkey.url, "index_deadline_ms": 300}
    with gateway(worker_url, **hasty) as one, gateway(worker_url, **hasty) as two:
        assert shared(one, two, key)
        wait_until(lambda: len(beats()) == 2, 60)
        both = beats()
        wait_until(lambda: all(beats()[name] > until for name, until in both.items()), 60)
        with valkey.frozen():
            for each in (one, two):
                said = [each.post(CHAT, json=BODY, headers=bearer(key)).status_code for _ in range(6)]
                assert 3 <= said.count(200) <= 5, "3, and what drains away meanwhile on a slow machine"
                assert set(said) == {200, 429}
                assert each.get("/admin/tenants").json()["shared"] is False


def test_an_isolated_tenant_has_the_same_salt_at_every_gateway_and_after_the_next_key(
    worker, worker_url, valkey: ValkeyServer
) -> None:
    where = ("--redis-url", valkey.url)
    key, salts = create(where, "--tenant", "a", "--isolate"), []
    for other in ("b", "c"):
        create(where, "--tenant", other)
        with gateway(worker_url, redis_url=valkey.url) as client:
            assert client.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
            salts.append(json.loads(worker.asked[-1][1])["cache_salt"])
    assert salts[0] == salts[1]


def test_a_key_made_right_after_redis_lost_its_memory_does_not_cost_the_others_nor_itself(
    worker_url, valkey: ValkeyServer
) -> None:
    where = ("--redis-url", valkey.url)
    old = create(where, "--tenant", "a")
    with gateway(worker_url, redis_url=valkey.url) as client:
        assert client.get("/v1/models", headers=bearer(old)).status_code == 200
        valkey.flush()
        new = create(where, "--tenant", "b")
        for key in (old, new):
            wait_until(lambda key=key: client.get("/v1/models", headers=bearer(key)).status_code == 200, 30)
        assert [row["tenant"] for row in json.loads(cairn("keys", "list", *where, "--json"))] == ["a", "b"]
        assert client.get("/v1/models", headers=bearer(old)).status_code == 200


def shared(*arguments: Any) -> bool:
    """Both gateways ask Redis by now."""
    *clients, key = arguments
    for client in clients:
        wait_until(lambda client=client: client.get("/admin/tenants").json()["shared"], 30)
    return bool(key)
