"""The official clients, in front of a worker that answers in vLLM's words; tests/engine has a real one."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.fakes import refusing_url, serve
from tests.gateway.test_endpoints import gateway

pytestmark = pytest.mark.e2e

ASK: Any = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
MESSAGE = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "hello"}], "usage": {"input_tokens": 1, "output_tokens": 1},
}  # fmt: skip
RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed",
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    "output": [
        {
            "id": "o", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "hello", "annotations": []}],
        }
    ],
}  # fmt: skip


class Fake:
    """A worker with one answer a path.  `busy`: how many more requests it refuses with 503 first."""

    def __init__(self) -> None:
        self.busy, self.silent = 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await send({"type": (await receive())["type"] + ".complete"})
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        path, status, kind = scope["path"], 200, b"application/json"
        if path.startswith("/v1") and path != "/v1/models":
            if self.silent:
                await receive()
                return None
            if self.busy:
                self.busy, status = self.busy - 1, 503
        asked = json.loads(body) if body.startswith(b"{") else {}
        if asked.get("stream"):
            kind, said = b"text/event-stream", _stream(path)
        else:
            said = json.dumps(_answer(path, asked)).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        return await send({"type": "http.response.body", "body": said})


def _answer(path: str, asked: dict[str, Any]) -> Any:
    if path == "/v1/models":
        return {"object": "list", "data": [{"id": "m"}]}
    if path == "/v1/messages":
        return MESSAGE
    if path == "/v1/messages/count_tokens":
        return {"input_tokens": 7}
    if path == "/v1/responses":
        return RESPONSE
    if path == "/v1/embeddings":
        return {"object": "list", "model": "m", "data": [{"index": 0, "embedding": [0.5, 1.0]}]}
    if path == "/v1/audio/transcriptions":
        return {"text": "heard"}
    text = '{"city": "Oslo"}' if "response_format" in asked else "hello"
    message = {"role": "assistant", "content": text, "tool_calls": [CALL] if "tools" in asked else None}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def _stream(path: str) -> bytes:
    if path == "/v1/chat/completions":
        words = [{"id": "c", "choices": [{"index": 0, "delta": {"content": word}}]} for word in ("hel", "lo")]
        return (
            b"".join(b"data: " + json.dumps(word).encode() + b"\n\n" for word in words) + b"data: [DONE]\n\n"
        )
    events: list[dict[str, Any]] = [{"type": "response.completed", "response": RESPONSE}]
    if path == "/v1/messages":
        events = [
            {"type": "message_start", "message": {**MESSAGE, "content": []}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
            {"type": "message_stop"},
        ]
    lines = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return "".join(lines).encode()


class City(BaseModel):
    city: str


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    with serve(fake) as url, gateway(f"m={url}", first_byte_timeout_seconds=60) as client:
        yield fake, str(client.base_url).rstrip("/")


@pytest.fixture
def sdk(house: tuple[Fake, str]) -> Iterator[openai.OpenAI]:
    house[0].busy, house[0].silent = 0, False
    with openai.OpenAI(base_url=f"{house[1]}/v1", api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(house: tuple[Fake, str]) -> Iterator[anthropic.Anthropic]:
    house[0].busy, house[0].silent = 0, False
    with anthropic.Anthropic(base_url=house[1], api_key="k", max_retries=0) as client:
        yield client


def test_openai_tools_structure_embeddings_responses_models_and_sound(sdk: openai.OpenAI) -> None:
    called = sdk.chat.completions.create(model="m", messages=ASK, tools=[TOOL]).choices[0].message.tool_calls
    assert called
    assert called[0].id == "c1"
    parsed = sdk.chat.completions.parse(model="m", messages=ASK, response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Oslo")
    assert sdk.embeddings.create(model="m", input="x", encoding_format="float").data[0].embedding == [
        0.5,
        1.0,
    ]
    assert sdk.responses.create(model="m", input="hi").output_text == "hello"
    assert [e.type for e in sdk.responses.create(model="m", input="hi", stream=True)] == [
        "response.completed"
    ]
    assert sdk.models.retrieve("m").id == "m"
    heard = sdk.audio.transcriptions.create(model="m", file=("a.wav", bytes(100_000)))
    assert heard.text == "heard"


def test_openai_errors_are_their_own_classes(sdk: openai.OpenAI, house: tuple[Fake, str]) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model="none", input="x")
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("none")
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        sdk.responses.create(model="m", input="x", previous_response_id="r")
    house[0].busy = 1
    with pytest.raises(openai.InternalServerError) as busy:
        sdk.responses.create(model="m", input="x")
    assert busy.value.status_code == 503
    assert busy.value.request_id


def test_openai_retries_what_is_busy_and_gives_up_in_time(house: tuple[Fake, str]) -> None:
    fake, url = house
    fake.busy, fake.silent = 1, False
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=2) as sdk:
        assert sdk.responses.create(model="m", input="x").output_text == "hello"
    fake.silent = True
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=0.5) as sdk,
        pytest.raises(openai.APITimeoutError),
    ):
        sdk.chat.completions.create(model="m", messages=ASK)
    fake.silent = False


def test_anthropic_creates_streams_counts_and_raises(
    claude: anthropic.Anthropic, house: tuple[Fake, str]
) -> None:
    said: Any = claude.messages.create(model="m", max_tokens=5, messages=ASK).content[0]
    assert said.text == "hello"
    with claude.messages.stream(model="m", max_tokens=5, messages=ASK) as stream:
        assert "".join(stream.text_stream) == "hello"
    assert claude.messages.count_tokens(model="m", messages=ASK).input_tokens == 7
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="none", max_tokens=5, messages=ASK)
    house[0].busy = 1
    with pytest.raises(anthropic.APIStatusError) as busy:
        claude.messages.create(model="m", max_tokens=5, messages=ASK)
    assert busy.value.status_code == 503
    assert busy.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index,call-overload]


def test_nobody_there_is_anthropics_error_too() -> None:
    with (
        gateway(f"m={refusing_url()}") as client,
        anthropic.Anthropic(base_url=str(client.base_url), api_key="k", max_retries=0) as claude,
        pytest.raises(anthropic.InternalServerError),
    ):
        claude.messages.create(model="m", max_tokens=5, messages=ASK)


def test_both_clients_work_without_blocking(house: tuple[Fake, str]) -> None:
    house[0].busy, house[0].silent = 0, False

    async def talk() -> None:
        async with (
            openai.AsyncOpenAI(base_url=f"{house[1]}/v1", api_key="k") as sdk,
            anthropic.AsyncAnthropic(base_url=house[1], api_key="k") as claude,
        ):
            stream = await sdk.chat.completions.create(model="m", messages=ASK, stream=True)
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "hello"
            with pytest.raises(openai.NotFoundError):
                await sdk.chat.completions.create(model="none", messages=ASK)
            async with claude.messages.stream(model="m", max_tokens=5, messages=ASK) as said:
                assert (await said.get_final_message()).stop_reason == "end_turn"
            with pytest.raises(anthropic.NotFoundError):
                await claude.messages.create(model="none", max_tokens=5, messages=ASK)

    asyncio.run(talk())
