"""Chunk keys: the one thing gateway, router and workers must agree on.

A key names a chunk of tokens *and every token before it*, in one namespace.  Equal keys mean equal KV.
The recipe is normative (docs/keys.md) and pinned by golden vectors in the tests: an accidental change is a
red build, not a silently cold fleet.  Nothing here knows of torch, vLLM or Redis.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NewType, cast

ChunkKey = NewType("ChunkKey", bytes)
Namespace = NewType("Namespace", bytes)

KEY_BYTES = 16
SCHEME_VERSION = 1
# The handshake's fixed vector: both sides key these tokens and compare.
PROBE_TOKENS = tuple(range(1, 1025))

_TAG_TYPES = {"lora": b"\x01", "salt": b"\x02", "mm": b"\x03"}


def digest(*parts: bytes) -> bytes:
    """First 16 bytes of SHA-256 (FIPS 180-4) over the concatenated parts."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part)
    return h.digest()[:KEY_BYTES]


def namespace_of(facts: Mapping[str, object]) -> Namespace:
    """Fingerprint of everything that changes what KV bytes mean.

    `facts` is written as sorted `name=value` lines, so the order of insertion does not matter and a new
    fact is a new namespace.  Values are escaped as inside a JSON string, so none can pose as another fact.
    """
    text = "\n".join(f"{name}={json.dumps(str(facts[name]))[1:-1]}" for name in sorted(facts))
    return Namespace(digest(f"cairn namespace v{SCHEME_VERSION}\n{text}".encode()))


@dataclass(frozen=True, slots=True)
class KeyScheme:
    """How one worker names chunks: its namespace and its chunk size in tokens."""

    namespace: Namespace
    chunk_tokens: int

    def root(self, tags: Sequence[tuple[str, str]] = ()) -> ChunkKey:
        """key_{-1}.  `tags` are ("lora" | "salt" | "mm", value) pairs: adapters, tenants and images never
        share KV by accident.  Raises KeyError for an unknown tag type."""
        return ChunkKey(digest(self.namespace, *(_tag(kind, value) for kind, value in sorted(tags))))

    def keys(self, tokens: Sequence[int], tags: Sequence[tuple[str, str]] = ()) -> list[ChunkKey]:
        """Keys of the full chunks of `tokens`, in order; the ragged tail has none."""
        chain = KeyChain(self, tags)
        chain.extend(tokens)
        return chain.keys


def _tag(kind: str, value: str) -> bytes:
    body = value.encode()
    return _TAG_TYPES[kind] + len(body).to_bytes(4, "little") + body


class KeyChain:
    """The keys of one growing prompt.  Each token is hashed once, however often extend() is called."""

    __slots__ = ("_done", "_n", "_root", "keys")

    def __init__(self, scheme: KeyScheme, tags: Sequence[tuple[str, str]] = ()) -> None:
        self._n = scheme.chunk_tokens
        self._root = scheme.root(tags)
        self._done = 0
        self.keys: list[ChunkKey] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """`tokens` is the whole prompt so far (a longer version of what was seen before)."""
        n = self._n
        full = len(tokens) // n * n
        if full <= self._done:
            return
        raw = token_bytes(tokens if full - self._done == len(tokens) else tokens[self._done : full])
        key: bytes = self.keys[-1] if self.keys else self._root
        chain: list[bytes] = []
        # digest(), without its calls: this loop is most of what a prompt costs the scheduler
        sha256, size = hashlib.sha256, 4 * n
        for i in range(0, len(raw), size):
            key = sha256(key + raw[i : i + size]).digest()[:KEY_BYTES]
            chain.append(key)
        self.keys += cast("list[ChunkKey]", chain)
        self._done = full

    def tail(self, tokens: Sequence[int], chunks: int, length: int) -> ChunkKey:
        """The key of a shorter chunk: `length` tokens (fewer than a full one) behind the first `chunks`."""
        key = self.keys[chunks - 1] if chunks else self._root
        return ChunkKey(digest(key, token_bytes(tokens[chunks * self._n : chunks * self._n + length])))


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    raw = array("I", tokens)
    if sys.byteorder == "big":
        raw.byteswap()
    return raw.tobytes()


def probe_keys(scheme: KeyScheme) -> list[str]:
    """The handshake: hex keys of the fixed vector under this scheme."""
    return [key.hex() for key in scheme.keys(PROBE_TOKENS)]
