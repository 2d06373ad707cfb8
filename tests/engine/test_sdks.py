"""The official clients → gateway → a real vLLM, on every path that a text model serves."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import anthropic
import httpx
import msgspec
import openai
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.dialects import Messages, Responses
from gateway.tokenize import ModelTokenizer
from tests.fakes import serve, wait_until
from tests.gateway.dialect_corpus import MESSAGES, RESPONSES

ASK = [{"role": "user", "content": "Say hi."}]
LONG = "Cairns mark a path across the fell. " * 120
GREEDY = {"extra_body": {"temperature": 0}}
TOOLS = ("--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="module")
def chatty(model, tiny, tmp_path_factory) -> Path:
    """The small random model with the bundled one's chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    for path in (*tiny.iterdir(), model / "chat_template.jinja"):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def stack(start, chatty, valkey_module) -> Iterator[SimpleNamespace]:
    worker = start(
        "sdks", {"host_bytes": 1 << 28}, weights=chatty, redis_url=valkey_module.unix_url, args=TOOLS
    ).ready()
    config = GatewayConfig(redis_url=valkey_module.unix_url, index_deadline_ms=200)
    with (
        serve(create_app(config)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as o,
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as a,
    ):
        wait_until(lambda: http.get("/health/ready").status_code == 200, 60)
        rows = lambda: http.get("/admin/workers").json()["workers"]  # noqa: E731
        wait_until(lambda: rows()[0]["trusted"], 60)
        yield SimpleNamespace(worker=worker, http=http, openai=o, anthropic=a)


def last_decision(stack) -> dict:
    return stack.http.get("/admin/decisions", params={"limit": 1}).json()["decisions"][0]


@pytest.mark.parametrize(
    ("path", "kind", "corpus"),
    [("/v1/messages", Messages, MESSAGES), ("/v1/responses", Responses, RESPONSES)],
)
def test_the_gateway_foretells_what_vllm_renders(stack, chatty, path, kind, corpus):
    tokenizer = ModelTokenizer.load(chatty)
    wrong = []
    for body in corpus:
        asked = msgspec.json.decode(json.dumps(body).encode(), type=kind)
        reply = stack.worker.http.post(f"{path}/render", json={"model": "smol", "max_tokens": 4, **body})
        assert reply.status_code == 200, (body, reply.text)
        if tokenizer.tokens(asked.chat(), True).ids != reply.json()["token_ids"]:
            wrong.append(body)
    assert wrong == []


def test_messages_and_responses_find_what_a_chat_left_in_the_cache(stack):
    system = {"role": "system", "content": f"Terse. {LONG}"}
    stack.openai.chat.completions.create(model="smol", messages=[system, *ASK], max_tokens=4)
    wait_until(lambda: _foretold(stack, system["content"]) > 512, 30)
    message = stack.anthropic.messages.create(
        model="smol", system=system["content"], messages=ASK, max_tokens=4
    )
    assert message.usage.cache_read_input_tokens >= last_decision(stack)["expected_hit_tokens"] > 512
    answer = stack.openai.responses.create(
        model="smol", instructions=system["content"], input="Say hi.", max_output_tokens=4
    )
    assert (
        answer.usage.input_tokens_details.cached_tokens >= last_decision(stack)["expected_hit_tokens"] > 512
    )


def _foretold(stack, system: str) -> int:
    body = {"model": "smol", "messages": [{"role": "system", "content": system}, *ASK]}
    return stack.http.post("/admin/route/explain", json=body).json()["expected_hit_tokens"]


def test_anthropics_client_creates_streams_counts_and_raises(stack):
    whole = stack.anthropic.messages.create(model="smol", messages=ASK, max_tokens=6, **GREEDY)
    assert whole.type == "message"
    assert whole.usage.output_tokens > 0
    with stack.anthropic.messages.stream(model="smol", messages=ASK, max_tokens=6, **GREEDY) as stream:
        text = "".join(stream.text_stream)
    assert text == whole.content[0].text
    count = stack.anthropic.messages.count_tokens(model="smol", messages=ASK)
    assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.NotFoundError):
        stack.anthropic.messages.create(model="none", messages=ASK, max_tokens=6)
    with pytest.raises(anthropic.BadRequestError):
        stack.anthropic.messages.create(
            model="smol", messages=ASK, max_tokens=6, extra_body={"temperature": -5}
        )


def test_openais_client_makes_responses_chooses_and_lists_models(stack):
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}  # a schema's white space has no end here
    said = stack.openai.chat.completions.create(model="smol", messages=ASK, max_tokens=64, extra_body=choice)
    assert said.choices[0].message.content in ("yes", "no")
    events = list(
        stack.openai.responses.create(model="smol", input="Say hi.", max_output_tokens=6, stream=True)
    )
    assert events[-1].type in ("response.completed", "response.incomplete")
    with pytest.raises(openai.BadRequestError, match="not kept"):
        stack.openai.responses.create(model="smol", input="x", previous_response_id="resp_1")
    card = stack.openai.models.retrieve("smol")
    assert card.max_model_len == 4096


def test_tokens_and_their_text_come_from_the_worker(stack):
    ids = stack.http.post("/tokenize", json={"model": "smol", "prompt": "One, two"}).json()["tokens"]
    assert (
        "One, two" in stack.http.post("/detokenize", json={"model": "smol", "tokens": ids}).json()["prompt"]
    )
