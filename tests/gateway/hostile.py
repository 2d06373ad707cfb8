"""What nobody sends by accident: bodies and headers for JSON endpoints, as hypothesis strategies."""

import gzip
import json

from hypothesis import strategies as st

Headers = list[tuple[bytes, bytes]]

# Values as they stand in a body: JSON that means nothing good ...
ODD = [
    b"null", b"true", b"0", b"-1", b"-0", b"1e-999", b"9" * 300, b"0." + b"1" * 300, b"1e308", b"[[]]", b"[]",
    b'""', b'"fake"', b'"\\u0000"', b'"\\ud83d\\ude00"', b'"' + b"a" * 40_000 + b'"', b"{}",
    b'"' + b"\\u00e9" * 10_000 + b'"', b"[" * 500 + b"]" * 500, b'{"a":' * 900 + b"1" + b"}" * 900,
    b"[" + b"0," * 5000 + b"0]", b"[" + b'"x",' * 500 + b'"x"]', b"[0, 4294967295]", b"[0, 4294967296]",
    b"[1, -1]", b"[1.0]", b"[true]", b'[[1], "x"]', b"[null]", b'{"__proto__": {}, "self": 1}',
    b'{"messages": [], "chat_template": "x", "tokenize": true}', b'{"type": "object", "properties": {}}',
]  # fmt: skip
# ... and what is no JSON at all, or not to everybody.
BROKEN = [
    b"1e999", b"-1E+400", b"9" * 5000, b"NaN", b"Infinity", b"-Infinity", b"undefined", b"01", b"+1", b".5",
    b"'x'", b"\xff", b"", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\\x"',
    b'"open',
    b'"\n"', b'"\xc0\xaf"', b'"\xf4\x90\x80\x80"', b"[" * 50_000, b'{"":' * 50_000, b"/*c*/1",
    b"[" * 20_000 + b"]" * 20_000,
]  # fmt: skip
FIELDS = b"""
    messages prompt input stream stream_options tools tool_choice documents add_generation_prompt n echo
    continue_final_message add_special_tokens chat_template chat_template_kwargs reasoning_effort query
    truncate_prompt_tokens prompt_embeds kv_transfer_params cache_salt prompt_logprobs logprobs user text_1
    prompt_cache_key max_tokens max_completion_tokens best_of instructions response_format priority text_2
    temperature seed stop suffix system tokens thinking output_config metadata reasoning truncation background
    previous_response_id previous_input_messages max_output_tokens documents texts items file mod\\u0065l
""".split()
ROLES = [b'"system"', b'"user"', b'"assistant"', b'"tool"', b'"developer"', b'"x"', b"7", b"null", b"[]"]
KINDS = [b"application/json", b"application/json; charset=utf-16", b"text/plain", b"", b"multipart/form-data",
         b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b"\xff"]  # fmt: skip
CODINGS = [b"gzip", b"deflate", b"br", b"identity", b"gzip, gzip", b"x" * 3000]


def _object(members: list[tuple[bytes, bytes]]) -> bytes:
    """Duplicates stay."""
    return b"{" + b",".join(b'"%b":%b' % member for member in members) + b"}"


def _nested(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    arrays = st.lists(inner, max_size=4).map(lambda parts: b"[" + b",".join(parts) + b"]")
    return arrays | st.lists(st.tuples(fields, inner), max_size=4).map(_object)


fields = st.sampled_from(FIELDS)
leaves = st.sampled_from(ODD) | st.text(max_size=30).map(lambda text: json.dumps(text).encode())
values = st.recursive(leaves, _nested, max_leaves=6)
parts = st.tuples(st.sampled_from([b'"text"', b'"image_url"', b'"refusal"', b"1", b"{}"]), values).map(
    lambda pair: _object([(b"type", pair[0]), (b"text", pair[1]), (b"refusal", pair[1])])
)
contents = values | st.lists(parts, max_size=3).map(lambda texts: b"[" + b",".join(texts) + b"]")
functions = st.tuples(values, values).map(
    lambda pair: _object([(b"name", pair[0]), (b"arguments", pair[1]), (b"parameters", pair[1])])
)
tools = functions.map(
    lambda function: b"[" + _object([(b"type", b'"function"'), (b"function", function)]) + b"]"
)
messages = st.lists(
    st.tuples(st.sampled_from(ROLES), contents, tools | values).map(
        lambda message: _object(
            [(b"role", message[0]), (b"content", message[1]), (b"tool_calls", message[2])]
        )
    ),
    max_size=3,
).map(lambda several: b"[" + b",".join(several) + b"]")
broken = st.sampled_from(BROKEN)
model = st.sampled_from(
    [b'"fake"'] * 6 + [b'"other"', b'"nick"', b'"\\u0066ake"', b"null", b"7", b'"\\ud800"']
)
names = fields | st.sampled_from([b"model", b"\\ud800", b"\xff", b"a" * 9000])
# a request that means something, with something odd in it, or after it
asks = st.tuples(
    model,
    st.sampled_from([b"messages", b"prompt", b"input", b"messages", b"system"]),
    messages | contents | tools,
    st.lists(st.tuples(fields, values | tools), max_size=4),
).map(lambda ask: _object([(b"model", ask[0]), (ask[1], ask[2]), *ask[3]]))  # fmt: skip

# the same, and one member of it breaks the whole
wrecks = st.tuples(asks, names, broken | values).map(lambda ask: b'{"%b":%b,' % ask[1:] + ask[0][1:])


def _cut(pair: tuple[bytes, float]) -> bytes:
    return pair[0][: int(len(pair[0]) * pair[1])]


def _spoilt(found: tuple[bytes, float, bytes]) -> bytes:
    body, where, byte = found
    at = int(len(body) * where)
    return body[:at] + byte + body[at + 1 :]


def _text(body: bytes) -> str:
    return body.decode("latin-1")


_share = st.floats(0, 1, exclude_max=True)
whole = st.integers(0, 9).flatmap(lambda n: asks if n < 8 else wrecks if n == 8 else values | broken)
mangled = st.one_of(
    st.tuples(asks, _share).map(_cut),
    st.tuples(asks, _share, st.binary(min_size=1, max_size=1)).map(_spoilt),
    st.binary(max_size=64),
    asks.map(gzip.compress),
    asks.map(lambda body: b"\xef\xbb\xbf" + body),
    asks.map(lambda body: _text(body).encode("utf-16")),
    asks.map(lambda body: body + b"\x00" + body),
)
bodies = st.integers(0, 2).flatmap(lambda n: whole if n else mangled)
headers = st.tuples(
    st.sampled_from(KINDS), st.none() | st.sampled_from(CODINGS), st.sampled_from([b"", b"x", b"\xff" * 40])
).map(
    lambda drawn: [
        (b"content-type", drawn[0]),
        *([(b"content-encoding", drawn[1])] if drawn[1] else []),
        *([(b"x-session-id", drawn[2]), (b"x-cairn-explain", b"1")] if drawn[2] else []),
    ]
)
