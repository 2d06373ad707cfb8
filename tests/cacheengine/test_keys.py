"""Keys, pinned.  The vectors are written out here and in docs/keys.md; neither may drift from the code."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheengine.keys import (
    PROBE_TOKENS,
    KeyChain,
    KeyScheme,
    Namespace,
    namespace_of,
    probe_keys,
    token_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"model": "example/tiny", "weights": "v1", "kv_dtype": "bfloat16", "chunk_tokens": 4}
SCHEME = KeyScheme(namespace_of(FACTS), 4)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 70000, 9]
TAGS = [("salt", "acme"), ("lora", "fr")]

GOLDEN = {
    "namespace": "fad01aba018a0c2b63110cd2154f5894",
    "key₋₁, no tags": "e395ed6b8e41a0cf2d6f03bfd0acd8bb",
    "tokens₀ = 1 2 3 4": "01000000020000000300000004000000",
    "key₀": "d6dfb1a29d4bb2cd34b815aa66b9404e",
    "tokens₁ = 5 6 7 70000": "05000000060000000700000070110100",
    "key₁": "be42f5353564c3229940da34352d6044",
    "tag lora `fr`": "01020000006672",
    "tag salt `acme`": "020400000061636d65",
    "key₋₁, both tags": "1fac56a62fa3e02cef4e0d8ade927464",
    "key₀, both tags": "a507c39679b6330578fd7988a9061614",
    "key₁, both tags": "36e26077ad91cbfa06f3ff32907f0ce5",
    "probe₀": "954313f695dfe92575726ca5131c5380",
    "probe₁": "74cd5b7f2b60f9583ce19620bb29d53a",
    "probe₂": "7d2a8b5c01a425fbb220bd076946d303",
    "probe₃": "63d8b72a6df271c72c4c34b671777ef8",
}

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_the_code_gives_the_golden_vectors() -> None:
    assert SCHEME.namespace.hex() == GOLDEN["namespace"]
    assert SCHEME.root().hex() == GOLDEN["key₋₁, no tags"]
    assert [key.hex() for key in SCHEME.keys(TOKENS)] == [GOLDEN["key₀"], GOLDEN["key₁"]]
    assert token_bytes(TOKENS[:4]).hex() == GOLDEN["tokens₀ = 1 2 3 4"]
    assert token_bytes(TOKENS[4:8]).hex() == GOLDEN["tokens₁ = 5 6 7 70000"]
    assert SCHEME.root(TAGS).hex() == GOLDEN["key₋₁, both tags"]
    tagged = [key.hex() for key in SCHEME.keys(TOKENS, TAGS)]
    assert tagged == [GOLDEN["key₀, both tags"], GOLDEN["key₁, both tags"]]
    probes = [hexed for name, hexed in GOLDEN.items() if name.startswith("probe")]
    assert probe_keys(KeyScheme(SCHEME.namespace, 256)) == probes


def test_the_page_shows_the_golden_vectors() -> None:
    page = (ROOT / "docs/keys.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| `([0-9a-f]+)` \|$", page, re.MULTILINE))
    assert rows == GOLDEN


def test_the_recipe_followed_by_hand_gives_them_too() -> None:
    def h(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()[:16]

    lines = "cairn namespace v1\nchunk_tokens=4\nkv_dtype=bfloat16\nmodel=example/tiny\nweights=v1"
    raw = {name: bytes.fromhex(hexed) for name, hexed in GOLDEN.items()}
    namespace = h(lines.encode())
    assert namespace == raw["namespace"]
    assert h(namespace, raw["tag lora `fr`"], raw["tag salt `acme`"]) == raw["key₋₁, both tags"]
    first = h(h(namespace), raw["tokens₀ = 1 2 3 4"])
    assert first == raw["key₀"]
    assert h(first, raw["tokens₁ = 5 6 7 70000"]) == raw["key₁"]


@given(tokens, st.lists(st.integers(0, 40)), st.integers(1, 8))
def test_a_growing_prompt_has_the_keys_of_the_whole(prompt: list[int], cuts: list[int], n: int) -> None:
    scheme = KeyScheme(SCHEME.namespace, n)
    chain = KeyChain(scheme)
    for cut in [*sorted(cuts), len(prompt)]:
        chain.extend(prompt[:cut])
    assert chain.keys == scheme.keys(prompt)
    assert len(chain.keys) == len(prompt) // n


@given(tokens, tokens)
def test_keys_are_shared_exactly_as_far_as_full_chunks_are(a: list[int], b: list[int]) -> None:
    shared = 0
    while shared < min(len(a), len(b)) // 4 and a[: 4 * shared + 4] == b[: 4 * shared + 4]:
        shared += 1
    same = [x == y for x, y in zip(SCHEME.keys(a), SCHEME.keys(b), strict=False)]
    assert same == [True] * shared + [False] * (len(same) - shared)


@pytest.mark.parametrize(
    "tags",
    [
        [("lora", "x")],
        [("salt", "x")],
        [("mm", "x")],
        [("lora", "")],
        [("lora", "x"), ("salt", "x")],
        [("mm", "x"), ("mm", "x")],
        [("lora", "x\x02\x01\x00\x00\x00x")],  # a value that looks like another tag
    ],
)
def test_every_tag_leads_somewhere_else(tags: list[tuple[str, str]]) -> None:
    others: list[list[tuple[str, str]]] = [[], [("lora", "y")], [("salt", "x"), ("salt", "x")]]
    assert SCHEME.root(tags) not in {SCHEME.root(other) for other in others}
    assert SCHEME.root(tags) == SCHEME.root(tags[::-1])


def test_an_unknown_tag_type_is_refused() -> None:
    with pytest.raises(KeyError):
        SCHEME.root([("tenant", "x")])


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_uint32_is_no_token(token: int) -> None:
    with pytest.raises(OverflowError):
        SCHEME.keys([token] * 4)


def test_a_fact_more_or_less_is_another_namespace_and_order_is_none() -> None:
    assert namespace_of(dict(reversed(FACTS.items()))) == SCHEME.namespace
    assert namespace_of(FACTS | {"rope": 10000}) != SCHEME.namespace
    assert namespace_of(FACTS | {"chunk_tokens": 8}) != SCHEME.namespace


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = (
        "from cacheengine.keys import *; import sys;"
        "print(*probe_keys(KeyScheme(Namespace(bytes.fromhex(sys.argv[1])), 256)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, SCHEME.namespace.hex()],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == probe_keys(KeyScheme(Namespace(SCHEME.namespace), 256))


def test_the_probe_is_1024_tokens() -> None:
    assert len(PROBE_TOKENS) == 1024
    assert len(probe_keys(KeyScheme(SCHEME.namespace, 256))) == 4
