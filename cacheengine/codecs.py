"""How KV bytes are stored below the host arena: as they are, or in fewer bits (figures: docs/codecs.md).

    raw     the bytes themselves
    fp8     K and V as e4m3 with a scale
    k16v8   K as it is (16 bits), V as e4m3 with a scale: an error in K moves attention, one in V only blurs

A scale belongs to the K, or the V, of one head in one page, and is a power of two: csrc/kv_codec.h has the
arithmetic, the stored form and its sources.  A page codes on its own, so a chunk of fewer blocks is only
shorter.  Which value lies where inside a head's K or V does not matter, which is what makes this work on
vLLM's CPU backend, whose kernels each pack keys their own way.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from cacheengine.build import CPU_LIBRARY, load_library
from cacheengine.config import ConfigError

RAW = "raw"

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}  # csrc/kv_codec.h, Kind
_K, _V = 1, 2  # csrc/kv_codec.h, Coded
_VECTOR = 16  # elements; csrc/kv_codec.h, kVector
# Layouts whose pages are known to be K and V side by side: vLLM's layout name and the attention ISA.  On the
# CPU a head is one run of K and one of V; on CUDA each token of a head is.
_HEAD_BY_HEAD = {"LBHNC/amx", "LBHNC/vec", "LBHNC/vec16"}
_TOKENS_IN_HEADS = {"LBHNC/cuda", "BLHNC/cuda"}
_HEADS_IN_TOKENS = {"LBNHC/cuda", "BLNHC/cuda"}


@dataclass(frozen=True, slots=True)
class Page:
    """One block of one layer: `pairs` times a run of K and a run of V.  Pair p is of head
    (p // inner) % heads.  Raises ValueError for what cannot be one."""

    heads: int
    inner: int
    pairs: int
    run: int  # elements; a multiple of 16
    dtype: str  # "bfloat16", "float16" or "float32"

    def __post_init__(self) -> None:
        if min(self.heads, self.inner, self.pairs, self.run) < 1 or self.pairs % (self.heads * self.inner):
            raise ValueError(f"not a page: {self}")
        if self.run % _VECTOR or self.dtype not in _KINDS:
            raise ValueError(f"runs of {self.run} elements of {self.dtype} cannot be coded")

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def nbytes(self) -> int:
        return 2 * self.pairs * self.run * self.width


class Codec(Protocol):
    """REQUIRES of every caller: buffers are 16-byte aligned, writable, and do not overlap.  All verbs raise
    ValueError, before a byte is written, for lengths that do not fit each other."""

    name: str  # at most 8 ASCII letters: it goes into every frame

    def encoded_bytes(self, payload_bytes: int) -> int:
        """Length of a payload once encoded."""

    def encode(self, data: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        """Fill into[i] from data[i]: one native call for the batch, without the interpreter lock."""

    def decode(self, data: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        """The way back, as near as the codec gets.  Any bytes decode to something."""


class Fp8:
    """Scaled e4m3: half of 16 bits, a quarter of 32.  Coding raises ConfigError without the native ops."""

    name = "fp8"
    coded = _K | _V

    def __init__(self, page: Page) -> None:
        self.page = page
        halves = self.coded.bit_count()
        scales = -(-4 * page.heads * halves // _VECTOR) * _VECTOR
        self._page_bytes = scales + page.pairs * page.run * (halves + (2 - halves) * page.width)
        self._header = (self.coded, _KINDS[page.dtype], page.heads, page.inner, page.pairs, page.run)

    def encoded_bytes(self, payload_bytes: int) -> int:
        pages, rest = divmod(payload_bytes, self.page.nbytes)
        if rest:
            raise ValueError(f"buffer of {payload_bytes} bytes is not whole pages of {self.page.nbytes}")
        return pages * self._page_bytes

    def encode(self, data: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        self._run("kv_cpu_encode", data, into, data, into)

    def decode(self, data: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        self._run("kv_cpu_decode", data, into, into, data)

    def words(
        self, data: Sequence[memoryview], into: Sequence[memoryview], raw: Sequence[memoryview]
    ) -> "array[int]":
        """The batch as the native side reads it (csrc/kv_codec.h)."""
        return array(
            "q",
            [*self._header, len(raw), *map(address_of, data), *map(address_of, into)]
            + [len(view) // self.page.nbytes for view in raw],
        )

    def _run(
        self,
        verb: str,
        data: Sequence[memoryview],
        into: Sequence[memoryview],
        raw: Sequence[memoryview],
        coded: Sequence[memoryview],
    ) -> None:
        for plain, small in zip(raw, coded, strict=True):
            if len(small) != self.encoded_bytes(len(plain)):
                raise ValueError(f"{len(plain)} bytes are not {len(small)} when encoded")
        words = self.words(data, into, raw)
        status = getattr(_library(), verb)(words.buffer_info()[0], len(words), -1)
        if status:
            raise ValueError(f"not a batch of pages (native status {status}); nothing was coded")


class K16V8(Fp8):
    """K exact, V as in fp8: three quarters.  Raises ConfigError for float32, whose K is not 16 bits."""

    name = "k16v8"
    coded = _V

    def __init__(self, page: Page) -> None:
        if page.width != 2:
            raise ConfigError(
                "codec k16v8 keeps the 16 bits of K and the KV cache is float32: use fp8 or raw"
            )
        super().__init__(page)


CODECS: dict[str, Callable[[Page], Codec]] = {"fp8": Fp8, "k16v8": K16V8}  # raw needs none


def page_of(layout: str, heads: int, block_tokens: int, block_bytes: int, dtype: str) -> Page | None:
    """The page of a layout ("LBHNC/amx"); None where nothing proves that it is K and V of `heads` heads."""
    if heads < 1 or dtype not in _KINDS:
        return None
    width = 4 if dtype == "float32" else 2
    if layout in _HEAD_BY_HEAD:
        inner, pairs = 1, heads
    elif layout in _TOKENS_IN_HEADS:
        inner, pairs = block_tokens, heads * block_tokens
    elif layout in _HEADS_IN_TOKENS:
        inner, pairs = 1, heads * block_tokens
    else:
        return None
    run, rest = divmod(block_bytes, 2 * pairs * width)
    return None if rest or run % _VECTOR or not run else Page(heads, inner, pairs, run, dtype)


def address_of(view: memoryview) -> int:
    """Where a buffer begins.  Valid while the buffer lives.  Raises TypeError for one that is read-only."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@cache
def _library() -> ctypes.CDLL:
    """The native ops with their signatures."""
    library = load_library(CPU_LIBRARY)
    for verb in ("kv_cpu_encode", "kv_cpu_decode"):
        call = getattr(library, verb)
        call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
    return library
