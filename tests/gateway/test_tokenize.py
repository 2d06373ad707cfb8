import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ask import Ask, read_ask
from gateway.encoders import PROBES, BpeEncoder, Memo, PlainEncoder, load_encoder
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer, Tokens
from tests.corpus import CHATS, LONG, user


def test_the_fast_encoder_is_used_where_it_is_exact(smollm: ModelTokenizer) -> None:
    assert smollm.encoder.name == "tiktoken"
    assert smollm.note == ""


@pytest.fixture(scope="module")
def pair(smollm_path: Path) -> tuple[BpeEncoder, PlainEncoder]:
    fast, _ = load_encoder(smollm_path / "tokenizer.json", 1 << 20)
    assert isinstance(fast, BpeEncoder)
    return fast, fast.plain


ALPHABET = [
    *"ab AB12.,'’\n\t\r\x04\x00é\u0301ß你🙂\u200d\u2028",
    "<|im_end|>",
    "<|im_start|>",
    "'ll",
    "  ",
    "\U000f0000",
]


@given(st.lists(st.sampled_from(ALPHABET) | st.text(max_size=3), max_size=60).map("".join))
@settings(max_examples=400, deadline=None)
def test_fast_and_plain_agree_on_any_text(pair: tuple[BpeEncoder, PlainEncoder], text: str) -> None:
    fast, plain = pair
    assert fast.encode(text, True) == plain.encode(text, True)


def test_fast_and_plain_agree_on_every_character(pair: tuple[BpeEncoder, PlainEncoder]) -> None:
    fast, plain = pair
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    random.Random(1).shuffle(codes)
    for at in range(0, len(codes), 4096):
        text = "".join(map(chr, codes[at : at + 4096]))
        assert fast.encode(text, False) == plain.encode(text, False)


@pytest.mark.parametrize(
    "text", [" " * 400_000, "\n" * 400_000 + "x", " \t" * 200_000], ids=["spaces", "lines", "mixed"]
)
def test_runs_of_whitespace_too_long_for_the_fast_engine_are_still_right(
    pair: tuple[BpeEncoder, PlainEncoder], text: str
) -> None:
    fast, plain = pair
    assert fast.encode(text, False) == plain.encode(text, False)


def test_a_second_look_at_a_conversation_changes_nothing(pair: tuple[BpeEncoder, PlainEncoder]) -> None:
    fast, plain = pair
    for end in range(0, 4000, 500):
        text = f"<|im_start|>system\n{LONG[:4000]}<|im_end|>\n<|im_start|>user\n{LONG[:end]}<|im_end|>\n"
        assert fast.encode(text, False) == plain.encode(text, False)
    fast.memo.check()


def test_the_memo_stays_within_its_bytes() -> None:
    memo = Memo(10_000)
    for i in range(1000):
        memo.put(f"{i} " * (i % 50), list(range(i % 70)))
        memo.get(f"{i // 2} " * (i // 2 % 50))
        memo.check()
    memo.put("x" * 10_000, [])
    assert memo.get("x" * 10_000) is None


def test_what_one_salt_has_said_is_not_remembered_for_another(smollm: ModelTokenizer) -> None:
    memo = Memo(10_000)
    memo.put("said", [1], "a")
    assert memo.get("said") is memo.get("said", "b") is None
    assert memo.get("said", "a") == [1]
    asks = [Ask(prompt="a stone " * 50, cache_salt=salt) for salt in ("a", "b", None)]
    first, *others = [smollm.tokens(ask, chat=False) for ask in asks]
    assert others == [first, first]


def _spec(smollm_path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((smollm_path / "tokenizer.json").read_text())
    return loaded


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}}, "tiktoken"),
    (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    BYTE_LEVEL | {"use_regex": True},
                ],
            }
        },
        "tiktoken",
    ),
    ({"normalizer": {"type": "NFC"}}, "tiktoken"),
    ({"normalizer": {"type": "Lowercase"}}, "tokenizers"),
    ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": True, "add_prefix_space": True}}, "tokenizers"),
    (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"invert": True}, BYTE_LEVEL]}},
        "tokenizers",
    ),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "tokenizers"),
]


@pytest.mark.parametrize(("change", "encoder"), SHAPES)
def test_only_shapes_that_can_be_rebuilt_exactly_are_rebuilt(
    smollm_path: Path, tmp_path: Path, change: dict[str, Any], encoder: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_spec(smollm_path) | change))
    found, why = load_encoder(path, 1 << 20)
    assert found.name == encoder
    assert bool(why) == (encoder == "tokenizers")
    if isinstance(found, BpeEncoder):
        for text in (*PROBES, LONG[:20_000]):
            assert found.encode(text, True) == found.plain.encode(text, True)


def test_a_shuffled_vocabulary_is_noticed(smollm_path: Path, tmp_path: Path) -> None:
    spec = _spec(smollm_path)
    spec["model"]["merges"] = spec["model"]["merges"][::-1]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    found, why = load_encoder(path, 1 << 20)
    assert found.name == "tokenizers"
    assert "order" in why


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"model": {}}'])
def test_a_file_that_is_no_tokenizer_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="not a tokenizer"):
        ModelTokenizer.load(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        ModelTokenizer.load(tmp_path / "nowhere")


def test_a_template_that_does_not_parse_is_a_value_error(smollm_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((smollm_path / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="chat template"):
        ModelTokenizer.load(tmp_path)


def test_named_templates_and_special_tokens_are_read_in_every_spelling(
    smollm_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((smollm_path / "tokenizer.json").read_bytes())
    config = {
        "bos_token": {"content": "<|im_start|>", "lstrip": False},
        "chat_template": [
            {"name": "default", "template": "{{ bos_token }}d"},
            {"name": "tool_use", "template": "{{ eos_token }}t"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "no", "eos_token": "<|im_end|>"}')
    model = ModelTokenizer.load(tmp_path)
    d, t = (model.encoder.encode(text, False) for text in "dt")
    assert model.chat(Ask(messages=[user("x")])).ids == [1, *d]
    assert model.chat(Ask(messages=[user("x")], tools=[{"type": "function", "function": {}}])).ids == [2, *t]


def test_completions_take_text_ids_and_lists_of_either(smollm: ModelTokenizer) -> None:
    one = smollm.encoder.encode("one", True)
    longer = smollm.encoder.encode("one and a half", True)
    assert smollm.completion(Ask(prompt="one")) == Tokens(one, len(one))
    assert smollm.completion(Ask(prompt=["one", "one and a half"])) == Tokens(longer, len(one) + len(longer))
    assert smollm.completion(Ask(prompt=[5, 6])) == Tokens([5, 6], 2)
    assert smollm.completion(Ask(prompt=[[5, 6], [7]])) == Tokens([5, 6], 3)
    assert smollm.completion(Ask(prompt=[])) == Tokens([], 0)


@pytest.mark.parametrize(
    "prompt", [None, 5, 1.5, {"a": 1}, [None], [5, "x"], [-1], [1 << 32], [True], [[1], ["x"]]]
)
def test_prompts_we_do_not_understand_have_no_keys(smollm: ModelTokenizer, prompt: Any) -> None:
    with pytest.raises(Unkeyable):
        smollm.tokens(Ask(prompt=prompt), False)


LONE = '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "\\"\\\\ud800\\""}}]}]}'
HI = '"messages": [{"role": "user", "content": "x"}]'
ODD = [
    '{"messages": null}', '{"messages": []}', '{"messages": [1]}', '{"messages": [{}]}',
    '{"messages": {"a": 1}}',
    '{"messages": [{"role": "user", "content": 5}]}',
    '{"messages": [{"role": "user", "content": [{"type": "x"}]}]}',
    '{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}',
    '{"messages": [{"role": 5, "content": "x"}]}',
    '{"messages": [{"role": "assistant", "tool_calls": [5]}]}',
    '{"messages": [{"role": "assistant", "tool_calls": 5}]}',
    f'{{{HI}, "tools": 5}}', f'{{{HI}, "tools": [{{}}]}}', f'{{{HI}, "chat_template": "{{{{ 1 }}}}"}}',
    f'{{{HI}, "chat_template_kwargs": 5}}', f'{{{HI}, "chat_template_kwargs": {{"tokenize": true}}}}',
    f'{{{HI}, "truncate_prompt_tokens": 5}}', f'{{{HI}, "continue_final_message": true}}',
]  # fmt: skip


@pytest.mark.parametrize("body", ODD)
def test_chats_we_do_not_understand_have_no_keys(smollm: ModelTokenizer, body: str) -> None:
    with pytest.raises(Unkeyable):
        smollm.tokens(read_ask(body.encode()), True)


def test_a_lone_surrogate_in_a_tool_call_does_no_harm(smollm: ModelTokenizer) -> None:
    assert smollm.tokens(read_ask(LONE.encode()), True).ids


def test_many_threads_get_the_same_ids(smollm: ModelTokenizer) -> None:
    with ThreadPoolExecutor(8) as pool:
        rounds = list(pool.map(lambda body: smollm.chat(Ask(messages=body["messages"])), CHATS[:16] * 8))
    assert rounds == [smollm.chat(Ask(messages=body["messages"])) for body in CHATS[:16]] * 8
