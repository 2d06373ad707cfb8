import pytest

from gateway.ask import read_ask, renamed
from gateway.errors import BadRequest


def test_only_a_few_fields_are_read_and_the_rest_is_let_be() -> None:
    ask = read_ask(b'{"model": "m", "messages": [1], "temperature": {"any": "thing"}, "top_p": 1e400}')
    assert (ask.model, ask.messages) == ("m", [1])


def test_a_salt_is_a_tag_and_an_odd_salt_is_the_workers_business() -> None:
    assert read_ask(b'{"cache_salt": "a"}').tags == (("salt", "a"),)
    assert read_ask(b'{"cache_salt": ""}').tags == read_ask(b'{"cache_salt": 5}').tags == ()


def test_a_session_is_named_as_openai_does_and_an_odd_name_is_none() -> None:
    assert read_ask(b'{"prompt_cache_key": "a", "user": "b"}').session == b"a"
    assert read_ask(b'{"prompt_cache_key": 7, "user": "b"}').session == b"b"
    assert read_ask(b'{"user": ["b"]}').session == read_ask(b"{}").session == b""


def test_a_model_that_is_no_string_is_named_in_the_error() -> None:
    with pytest.raises(BadRequest) as caught:
        read_ask(b'{"model": []}')
    assert caught.value.param == "model"


def test_prompts_shaped_by_more_than_the_template_are_not_keyed() -> None:
    assert read_ask(b'{"kv_transfer_params": {"do_remote_prefill": true}}').keyable
    assert not read_ask(b'{"kv_transfer_params": {"prompt_token_ids": [1]}}').keyable
    assert not read_ask(b'{"truncate_prompt_tokens": 5}').keyable


def test_what_asks_about_every_prompt_token_reads_no_cache_and_is_not_keyed() -> None:
    assert not read_ask(b'{"prompt_logprobs": 0}').keyable
    assert not read_ask(b'{"echo": true, "logprobs": 1}').keyable
    assert read_ask(b'{"echo": true}').keyable
    assert read_ask(b'{"logprobs": true}').keyable


def test_a_name_that_is_no_utf8_is_a_bad_request_also_behind_an_alias() -> None:
    with pytest.raises(BadRequest):
        renamed(b'{"model": "alias", "\xff": 1}', "m")


def test_a_request_under_an_alias_changes_its_model_and_nothing_else() -> None:
    body = '{"model": "x", "n": 1e400, "messages" : [ {"a":  "ü\\u00fc"} ], "model":"alias"}'.encode()
    assert renamed(body, 'a"b') == '{"model":"a\\"b","n":1e400,"messages":[ {"a":  "ü\\u00fc"} ]}'.encode()
    assert renamed(b"{}", "m") == b'{"model":"m"}'


def test_a_text_that_is_no_utf8_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        read_ask(b'{"prompt": "\xc0\xaf"}')
