"""Text to token ids.  Two encoders with one answer: tiktoken where it is proved exact, else `tokenizers`.

A byte-level BPE tokenizer is a rank table and one regular expression.  Where tokenizer.json has that shape we
build a tiktoken encoding from it (several times faster, releases the GIL) and compare both on a probe corpus
before using it.  Added tokens split the text before BPE, so the stretches between them (chat turns)
are encoded independently, and remembered: a long conversation costs only its newest turn.
"""

import json
import re
import threading
import unicodedata
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import tiktoken
from tokenizers import Tokenizer

# What transformers' ByteLevel pre-tokenizer and its digit-splitting variant do, as one expression.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's backtracking engine overflows on whitespace runs of some 10^5 characters, and aborts the call.
_LONG_RUN_CHARS = 10_000
_LONG_RUN = re.compile(rf"\s{{{_LONG_RUN_CHARS}}}")
_ID_BYTES = 36  # one Python int in a list: 8 for the pointer, 28 for the object

PROBES = (
    "", " ", "   ", "\n", " \n\n  \t x ", "a", "Hello, world!", "I'LL don't we've it's y'all 'tis",
    "3.14e10 007 12345678 1,000,000 ½ ² ٣٤", "def f(x):\n    return x ** 2  # square\n\n\n\tpass\r\n",
    "naïve café e\u0301 Zürich ﬁ ﷺ", "你好，世界。日本語のテキスト 한국어", "Привет мир! مرحبا بالعالم שלום",
    "🙂👩‍👩‍👧‍👦🇩🇪 \u200b\u2028\ufeff", "https://example.com/a_b?c=d&e=%20#frag  {\"k\": [1, null]}",
    "x" * 300, "=-" * 90,
    "\x00\x01\x04\x1f\x7f\x85\xa0", "𠮷 \U000e0001 \ue000 \U0010ffff", "aaaa bbbb  cccc   dddd\n\n \n  e",
)  # fmt: skip


class Encoder(Protocol):
    """Token ids of a text.  Thread-safe; equal for equal texts.  What is remembered is one tenant's, `whose`:
    another could measure it."""

    name: str

    def encode(self, text: str, add_special_tokens: bool, whose: str = "") -> list[int]: ...


class PlainEncoder:
    """`tokenizers` as it comes."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool, whose: str = "") -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


class BpeEncoder:
    """tiktoken between added tokens, with a memo of stretches; `tokenizers` for what tiktoken cannot take."""

    name = "tiktoken"

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer, memo_bytes: int) -> None:
        """`spec` is a parsed tokenizer.json.  Raises NotBpe with the reason it does not fit."""
        pattern = _pattern(spec)
        ranks = _ranks(spec)
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.plain = PlainEncoder(tokenizer)
        self.bpe = tiktoken.Encoding("cairn", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._unknown = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._nfc = spec.get("normalizer") is not None
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        self.memo = Memo(memo_bytes)
        self._before, self._after = _template_ids(tokenizer)

    def encode(self, text: str, add_special_tokens: bool, whose: str = "") -> list[int]:
        ids: list[int] = [*self._before] if add_special_tokens else []
        stretches = self._split.split(text) if self._split else [text]
        for stretch in stretches:
            if (special := self._added.get(stretch)) is not None:
                ids.append(special)
            elif stretch:
                ids += self._stretch(stretch, whose)
        if add_special_tokens:
            ids += self._after
        return ids

    def _stretch(self, text: str, whose: str) -> list[int]:
        if (known := self.memo.get(text, whose)) is not None:
            return known
        ids = self.bpe.encode_ordinary(text) if self._fits(text) else self.plain.encode(text, False)
        self.memo.put(text, ids, whose)
        return ids

    def _fits(self, text: str) -> bool:
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            return False
        if len(text) > _LONG_RUN_CHARS and _LONG_RUN.search(text):
            return False
        raw = text.encode()  # json cannot have let a lone surrogate through: msgspec refuses them
        return len(raw.translate(None, self._unknown)) == len(raw)


class NotBpe(Exception):
    """This tokenizer.json is not a byte-level BPE we can rebuild exactly."""


class Memo:
    """Least recently used texts and their ids, within a number of bytes, tenants apart.  Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._used = 0
        self._lock = threading.Lock()
        self._ids: OrderedDict[tuple[str, str], list[int]] = OrderedDict()

    def get(self, text: str, whose: str = "") -> list[int] | None:
        with self._lock:
            ids = self._ids.get((text, whose))
            if ids is not None:
                self._ids.move_to_end((text, whose))
            return ids

    def put(self, text: str, ids: list[int], whose: str = "") -> None:
        """The caller does not change `ids` afterwards.  A text too large to keep is not kept."""
        cost = _cost((text, whose), ids)
        with self._lock:
            if cost > self._capacity or (text, whose) in self._ids:
                return
            self._ids[text, whose] = ids
            self._used += cost
            while self._used > self._capacity:
                self._used -= _cost(*self._ids.popitem(last=False))

    def check(self) -> None:
        """The books: what is held is what was counted, and fits."""
        with self._lock:
            assert self._used == sum(_cost(name, ids) for name, ids in self._ids.items()) <= self._capacity


def _cost(name: tuple[str, str], ids: list[int]) -> int:
    return 4 * sum(map(len, name)) + _ID_BYTES * len(ids) + 300


def load_encoder(path: Path, memo_bytes: int) -> tuple[Encoder, str]:
    """The fastest encoder that is exact for `path`/tokenizer.json, and why it is not tiktoken if it is not.

    Raises OSError when there is no such file, ValueError when it is not a tokenizer."""
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
        spec = json.loads(text)
    except Exception as exc:  # `tokenizers` raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {exc}") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = PlainEncoder(tokenizer)
    try:
        fast = BpeEncoder(spec, tokenizer, memo_bytes)
    except NotBpe as exc:
        return plain, str(exc)
    except (KeyError, TypeError, ValueError) as exc:  # a file, or an expression, of a shape we have not met
        return plain, f"{type(exc).__name__}: {exc}"
    joined = "".join(fast._added).join(("", *PROBES, ""))
    for probe in (*PROBES, *fast._added, " ".join(PROBES), joined):
        for special in (False, True):
            if fast.encode(probe, special) != plain.encode(probe, special):
                return plain, f"probe {probe[:40]!r} differs"
    return fast, ""


def _pattern(spec: dict[str, Any]) -> str:
    """The pre-tokenizer as one expression."""
    if spec.get("normalizer") not in (None, {"type": "NFC"}):
        raise NotBpe("it normalizes")
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise NotBpe("its pre-tokenizer does not end in ByteLevel without a prefix space")
    *before, byte_level = steps
    regex = byte_level.get("use_regex", True)
    if not before and regex:
        return _GPT2
    if before == [{"type": "Digits", "individual_digits": True}] and regex:
        return _DIGITS
    if len(before) == 1 and not regex and before[0].get("type") == "Split":
        split = before[0]
        if (
            split.get("behavior") == "Isolated"
            and not split.get("invert")
            and "Regex" in split.get("pattern", {})
        ):
            return str(split["pattern"]["Regex"])
    raise NotBpe("its pre-tokenizer is not one expression we know")


def _ranks(spec: dict[str, Any]) -> dict[bytes, int]:
    """Token bytes to ids.  tiktoken merges the lowest id first, so ids must rise with the merge order."""
    model = spec["model"]
    odd = (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
    )
    if model.get("type") != "BPE" or any(model.get(name) for name in odd):
        raise NotBpe("its model is not plain byte-level BPE")
    plain = {"single_word", "lstrip", "rstrip", "normalized"}
    if any(token[name] for token in spec["added_tokens"] for name in plain):
        raise NotBpe("its added tokens absorb or depend on the text around them")
    vocab: dict[str, int] = model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    order = [vocab[left + right] for left, right in merges]
    if any(a >= b for a, b in pairwise(order)):
        raise NotBpe("its merges are not in the order of their ids")
    alphabet = _alphabet()
    special = {token["content"] for token in spec["added_tokens"]}
    try:
        return {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if token not in special}
    except KeyError as exc:
        raise NotBpe(f"its vocabulary has the character {exc}") from None


def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the rest follow from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def _template_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids the post-processor puts before and after a text."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    full: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    raise NotBpe("its post-processor rewrites the text's ids")
