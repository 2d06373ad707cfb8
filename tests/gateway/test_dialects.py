"""Which bodies of /v1/messages and /v1/responses are chats we foretell; tests/engine compares with vLLM."""

import json
from typing import Any

import msgspec
import pytest

from gateway.ask import Ask
from gateway.dialects import Messages, Responses
from gateway.errors import BadRequest
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from tests.gateway.dialect_corpus import MESSAGES, RESPONSES

USER = {"role": "user", "content": "hi"}


def messages(**body: Any) -> Messages:
    return msgspec.json.decode(json.dumps(body).encode(), type=Messages)


def responses(**body: Any) -> Responses:
    return msgspec.json.decode(json.dumps(body).encode(), type=Responses)


def test_the_same_conversation_has_the_same_tokens_in_every_dialect(smollm: ModelTokenizer) -> None:
    said = [USER, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "again"}]
    chat = smollm.tokens(Ask(messages=[{"role": "system", "content": "s"}, *said]), True).ids
    assert smollm.tokens(messages(system="s", messages=said).chat(), True).ids == chat
    assert smollm.tokens(responses(instructions="s", input=said).chat(), True).ids == chat


@pytest.mark.parametrize("body", MESSAGES)
def test_every_message_of_the_corpus_is_a_chat(smollm: ModelTokenizer, body: dict[str, Any]) -> None:
    assert smollm.tokens(messages(**body).chat(), True).ids


@pytest.mark.parametrize("body", RESPONSES)
def test_every_response_of_the_corpus_is_a_chat(smollm: ModelTokenizer, body: dict[str, Any]) -> None:
    assert smollm.tokens(responses(**body).chat(), True).ids


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": [USER], "thinking": {"type": "disabled"}}, "thinking"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "multimodal"),
        ({"messages": "x"}, "messages"),
        ({"messages": [5]}, "messages"),
        ({}, "messages"),
    ],
)
def test_messages_that_are_not_foretold(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unkeyable) as caught:
        messages(**body).chat()
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "truncation": "auto"},
        {"input": "x", "truncation": None},
        {"input": "x", "tools": [{"type": "web_search_preview"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"type": "reasoning", "summary": []}]},
        {"input": [{"role": "assistant", "content": "x", "status": "incomplete"}]},
        {"input": 5},
        {},
    ],
)
def test_responses_that_are_not_foretold(body: dict[str, Any]) -> None:
    with pytest.raises(Unkeyable):
        responses(**body).chat()


def test_a_conversation_has_the_name_its_caller_gives_it() -> None:
    assert messages(metadata={"user_id": "u"}).session == b"u"
    assert messages(metadata=5).session == b""
    assert responses(prompt_cache_key="k", user="u").session == b"k"


def test_salts_reach_the_keys() -> None:
    assert messages(messages=[USER], cache_salt="a").chat().tags == (("salt", "a"),)
    assert responses(input="x", cache_salt="a").chat().tags == (("salt", "a"),)


def test_what_only_one_worker_could_know_is_refused() -> None:
    responses(input="x", background=False).check()
    for body in ({"previous_response_id": "r"}, {"background": True}):
        with pytest.raises(BadRequest):
            responses(input="x", **body).check()
