"""SDK → gateway → router → two vLLM workers → host / Redis: nothing on this path is a stand-in.

The tests run in order: the last ones take the stack apart.
"""

import http.client
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from gateway.ask import read_ask
from gateway.tokenize import ModelTokenizer
from tests.corpus import CHATS, COMPLETIONS
from tests.engine.prompts import conversation
from tests.engine.rig import Worker, free_port

LONG = "Cairns mark a path across the fell. " * 150


def until(true: Callable[[], object], seconds: float = 30) -> float:
    """Wait until it holds; how long that took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def stack(start, valkey_module, tmp_path_factory) -> Iterator[SimpleNamespace]:
    url = valkey_module.unix_url
    cache = {"host_bytes": 1 << 30}
    workers = {
        name: start(name, {**cache, "worker_id": name}, core=core, redis_url=url)
        for core, name in enumerate(("w1", "w2"))
    }
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    port = free_port()
    flags = {"port": port, "index_deadline_ms": 200}  # the workers keep both cores busy
    with log.open("wb") as out:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "gateway.launch.serve", json.dumps(flags)],
            env={**os.environ, "CAIRN_REDIS_URL": url}, stdout=out, stderr=out,
        )  # fmt: skip
    base = f"http://127.0.0.1:{port}"
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Worker.ready, workers.values()))
        sender = httpx.Client(base_url=base, timeout=60)
        until(lambda: _ready(sender) == 2, 60)
        until(lambda: all(row["trusted"] for row in sender.get("/admin/workers").json()["workers"]))
        sdk = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        yield SimpleNamespace(workers=workers, http=sender, sdk=sdk, log=log, valkey=valkey_module)
        sdk.close()
        sender.close()
    finally:
        gateway.kill()
        gateway.wait()


def _ready(http: httpx.Client) -> int:
    try:
        return int(http.get("/health/ready").json()["workers"])
    except httpx.TransportError:
        return 0


def chat(stack, messages, tokens=8, **fields):
    fields = {"temperature": 0, **fields}
    return stack.sdk.chat.completions.create(model="smol", messages=messages, max_tokens=tokens, **fields)


def last_decision(stack) -> dict:
    return stack.http.get("/admin/decisions", params={"limit": 1}).json()["decisions"][0]


def beat(stack, name) -> dict[str, str]:
    with stack.valkey.client() as client:
        (lease,) = client.keys(f"cairn:*:worker:{name}")
        return {field.decode(): value.decode() for field, value in client.hgetall(lease).items()}


def writes_to_redis(worker) -> bool:
    had = worker.metric("cairn_engine_saved_chunks_total", tier="redis")
    worker.complete([100 + secrets.randbelow(1000) for _ in range(260)], 1)
    worker.settled("redis", 1)
    return worker.metric("cairn_engine_saved_chunks_total", tier="redis") > had


def running(stack) -> float:
    return sum(
        w.metric("vllm:num_requests_running") + w.metric("vllm:num_requests_waiting")
        for w in stack.workers.values()
        if w.process.poll() is None
    )


def test_the_gateway_foretells_the_token_ids_of_every_request_in_the_corpus(stack, model):
    """Equal ids are equal keys: one function makes both sides' keys (docs/keys.md)."""
    tokenizer = ModelTokenizer.load(Path(model))
    worker = stack.workers["w1"]
    compared = 0
    for is_chat, bodies in ((True, CHATS), (False, COMPLETIONS)):
        for body in bodies:
            full = {"model": "smol", **body}
            if not is_chat and not isinstance(body.get("prompt"), str):
                continue  # /tokenize takes one text
            reply = worker.http.post("/tokenize", json=full)
            if reply.status_code != 200:
                continue  # the worker refuses it, so there is nothing to route
            ask = read_ask(json.dumps(full).encode())
            assert tokenizer.tokens(ask, is_chat).ids == reply.json()["tokens"], str(body)[:200]
            compared += 1
    assert compared >= 20


def test_the_official_sdk_chats_completes_streams_and_lists(stack):
    assert [m.id for m in stack.sdk.models.list()] == ["smol"]
    two = stack.sdk.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "Say hi."}], max_tokens=8, n=2
    )
    assert len(two.choices) == 2
    whole = chat(stack, [{"role": "user", "content": "Say hi."}])
    assert whole.usage.completion_tokens > 0
    pieces = list(
        chat(
            stack,
            [{"role": "user", "content": "Say hi."}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert stack.sdk.completions.create(model="smol", prompt="One, two,", max_tokens=4).choices[0].text


def test_errors_are_the_sdk_s_own_classes(stack):
    with pytest.raises(openai.NotFoundError) as unknown:
        stack.sdk.chat.completions.create(model="gpt-none", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        chat(stack, [{"role": "user", "content": "x"}], temperature=-5)
    reply = stack.http.post("/v1/chat/completions", content=b'{"model": "smol", ')
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_second_turn_goes_to_the_worker_that_holds_the_first(stack):
    """Several conversations, so that chance alone would not do it."""
    for n in range(4):
        system = {"role": "system", "content": f"Conversation {n}. {LONG}"}
        messages = [system, {"role": "user", "content": "What is a cairn?"}]
        first = chat(stack, messages)
        home = last_decision(stack)["worker"]
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And why do hikers build them?"},
        ]
        time.sleep(2.5)  # the index hears of it at once; of the load that is over, with the next beat
        second = chat(stack, messages)
        decision = last_decision(stack)
        assert (decision["worker"], decision["reason"]) == (home, "hit")
        assert decision["expected_hit_tokens"] >= 768
        assert second.usage.prompt_tokens_details.cached_tokens >= 768


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_engine(stack, stream):
    """vLLM's own gauge: the request would run for minutes."""
    until(lambda: running(stack) == 0)
    body = {
        "model": "smol", "stream": stream, "max_tokens": 3000, "ignore_eos": True, "temperature": 0,
        "messages": [{"role": "user", "content": f"Count without end. {stream}"}],
    }  # fmt: skip
    hang_up = threading.Event()

    def client() -> None:
        connection = http.client.HTTPConnection(stack.http.base_url.host, stack.http.base_url.port)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        if stream:
            connection.getresponse().read(1)
        hang_up.wait(120)
        connection.close()

    thread = threading.Thread(target=client)
    thread.start()
    until(lambda: running(stack) == 1, 60)
    hang_up.set()
    thread.join()
    assert until(lambda: running(stack) == 0, 20) < 20
    assert stack.http.get("/admin/workers").json()["inflight"] == 0


def test_without_redis_every_request_still_succeeds(stack):
    messages = [{"role": "user", "content": f"No Redis today. {LONG}"}]
    answer = chat(stack, messages).choices[0].message.content
    with stack.valkey.frozen():
        for _ in range(6):
            assert chat(stack, messages).choices[0].message.content == answer
    until(lambda: last_decision(stack)["index"] == "up" or not chat(stack, messages))


def test_a_worker_killed_mid_stream_is_an_error_event_and_the_other_answers_from_redis(stack):
    for name, worker in stack.workers.items():  # Redis was frozen before: both must have found it again
        until(lambda name=name: beat(stack, name)["redis_up"] == "1")
        until(lambda worker=worker: writes_to_redis(worker))
    prompt = conversation(stack.workers["w1"], 1)[0] * 4
    before = {name: worker.written("redis") for name, worker in stack.workers.items()}
    stream = stack.sdk.completions.create(
        model="smol", prompt=prompt, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    victim = last_decision(stack)["worker"]
    (other,) = set(stack.workers) - {victim}
    stack.workers[victim].settled("redis", int(before[victim]) + len(prompt) // 256)
    stack.workers[victim].kill()
    with pytest.raises(openai.APIError) as died:
        for _ in stream:
            pass
    assert died.value.body["type"] == "server_error", died.value.body

    had = stack.workers[other].hits("redis")
    answer = stack.sdk.completions.create(
        model="smol", prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 8
    assert stack.workers[other].hits("redis") - had >= len(prompt) // 256 * 256 - 256

    until(lambda: _ready(stack.http) == 1, 10)
    with stack.valkey.client() as client:
        until(lambda: not client.keys(f"cairn:*:worker:{victim}"), 10)
