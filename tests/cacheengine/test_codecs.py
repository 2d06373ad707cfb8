"""The law of a codec (cacheengine/codecs.py), executed over every one of them."""

import math
import mmap
import random
import struct
from collections.abc import Iterator
from typing import get_args

import pytest

from cacheengine.codecs import CODECS, RAW, Codec, Page, page_of
from cacheengine.config import CodecName, ConfigError

PAGES = {
    "head by head, bf16": Page(3, 1, 3, 64, "bfloat16"),
    "tokens in heads, fp16": Page(2, 16, 32, 32, "float16"),
    "heads in tokens, fp32": Page(4, 1, 64, 16, "float32"),
}
FORMATS = {"bfloat16": "e", "float16": "e", "float32": "f"}
E4M3_STEP = 2**-4  # the most a normal number is off, relative to its size


def accepted() -> Iterator[tuple[str, str]]:
    for name in CODECS:
        for shape, page in PAGES.items():
            if (name, page.dtype) != ("k16v8", "float32"):
                yield name, shape


@pytest.fixture(params=accepted(), ids=lambda pair: f"{pair[0]}, {pair[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Codec, Page]:
    name, shape = request.param
    return CODECS[name](PAGES[shape]), PAGES[shape]


def memory(size: int, fill: bytes = b"") -> memoryview:
    view = memoryview(mmap.mmap(-1, max(size, 1)))[:size]
    view[: len(fill)] = fill
    return view


def pack(page: Page, values: list[float]) -> bytes:
    if page.dtype == "bfloat16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{FORMATS[page.dtype]}", *values)


def unpack(page: Page, raw: memoryview) -> list[float]:
    if page.dtype == "bfloat16":
        return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
    return list(struct.unpack(f"<{len(raw) // page.width}{FORMATS[page.dtype]}", raw))


def noise(page: Page, pages: int, seed: int, scale: float = 1.0) -> memoryview:
    rng = random.Random(seed)
    values = [rng.gauss(0, scale) for _ in range(2 * pages * page.pairs * page.run)]
    return memory(pages * page.nbytes, pack(page, values))


def through(codec: Codec, *payloads: memoryview) -> list[memoryview]:
    """Encoded and decoded again, as one batch."""
    small = [memory(codec.encoded_bytes(len(one))) for one in payloads]
    back = [memory(len(one)) for one in payloads]
    codec.encode(payloads, small)
    codec.decode(small, back)
    return back


def test_the_configuration_knows_exactly_these_codecs() -> None:
    assert get_args(CodecName) == (RAW, *CODECS)


def test_a_codec_is_known_by_its_name_which_fits_into_a_frame(case: tuple[Codec, Page]) -> None:
    codec, page = case
    assert type(codec) is type(CODECS[codec.name](page))
    assert 0 < len(codec.name.encode("ascii")) <= 8


def test_a_short_chunk_is_as_much_shorter_when_encoded(case: tuple[Codec, Page]) -> None:
    codec, page = case
    one = codec.encoded_bytes(page.nbytes)
    assert 0 < one <= page.nbytes
    assert [codec.encoded_bytes(n * page.nbytes) for n in (0, 2, 7)] == [0, 2 * one, 7 * one]


def test_what_was_encoded_comes_back_within_the_codec_s_promise(case: tuple[Codec, Page]) -> None:
    codec, page = case
    payloads = [noise(page, pages, pages, scale=10.0**pages) for pages in (1, 3, 2)]
    for payload, back in zip(payloads, through(codec, *payloads), strict=True):
        exact, near = unpack(page, payload), unpack(page, back)
        most = max(map(abs, exact))
        assert all(abs(a - b) <= abs(a) * E4M3_STEP + most * 2**-18 for a, b in zip(exact, near, strict=True))


def test_the_callers_data_is_only_read(case: tuple[Codec, Page]) -> None:
    codec, page = case
    payload = noise(page, 2, 1)
    through(codec, payload)
    assert payload == noise(page, 2, 1)


def test_an_empty_batch_is_fine(case: tuple[Codec, Page]) -> None:
    case[0].encode([], [])
    case[0].decode([], [])


def test_lengths_that_do_not_fit_are_a_bug_and_nothing_is_written(case: tuple[Codec, Page]) -> None:
    codec, page = case
    payload, out = noise(page, 1, 1), memory(codec.encoded_bytes(page.nbytes) + 16)
    for verb in (codec.encode, codec.decode):
        with pytest.raises(ValueError, match=r"."):
            verb([payload], [out])
        with pytest.raises(ValueError, match=r"."):
            verb([payload], [])
    assert not any(out)


@pytest.mark.parametrize("name", CODECS)
def test_a_lossy_codec_refuses_what_is_not_whole_pages(name: str) -> None:
    codec = CODECS[name](PAGES["head by head, bf16"])
    with pytest.raises(ValueError, match="buffer of 769 bytes is not whole pages of 768"):
        codec.encoded_bytes(769)


def test_values_far_beyond_448_keep_their_size() -> None:
    """A plain cast would make every one of them 448."""
    page = PAGES["head by head, bf16"]
    (back,) = through(CODECS["fp8"](page), noise(page, 1, 1, scale=1e6))
    assert max(map(abs, unpack(page, back))) > 1e6


def test_a_head_with_large_values_costs_its_neighbours_nothing() -> None:
    """Scales are each head's own, and K's and V's."""
    page = PAGES["head by head, bf16"]
    quiet = noise(page, 1, 1)
    values = unpack(page, quiet)
    loud = memory(page.nbytes, pack(page, [x * 2**40 if i < page.run else x for i, x in enumerate(values)]))
    codec = CODECS["fp8"](page)
    assert through(codec, loud)[0][2 * page.run :] == through(codec, quiet)[0][2 * page.run :]


def test_k16v8_keeps_every_bit_of_k() -> None:
    page = PAGES["head by head, bf16"]
    payload = memory(page.nbytes, random.Random(1).randbytes(page.nbytes))
    (back,) = through(CODECS["k16v8"](page), payload)
    run = 2 * page.run
    for pair in range(page.pairs):
        k = slice(2 * pair * run, (2 * pair + 1) * run)
        v = slice(k.stop, k.stop + run)
        assert back[k] == payload[k]
        assert back[v] != payload[v]


def test_k16v8_refuses_float32_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="use fp8 or raw"):
        CODECS["k16v8"](PAGES["heads in tokens, fp32"])


def test_zeros_keep_their_sign_and_what_is_not_finite_becomes_nan_alone() -> None:
    page = Page(1, 1, 1, 16, "bfloat16")
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0, 0.5, *[1.0] * 24]
    (back,) = through(CODECS["fp8"](page), memory(page.nbytes, pack(page, values)))
    near = unpack(page, back)
    assert [math.copysign(1, x) for x in near[:2]] == [1, -1]
    assert all(math.isnan(x) for x in near[2:5])
    assert near[5:] == values[5:]


@pytest.mark.parametrize(
    ("layout", "dtype", "page"),
    [
        ("LBHNC/amx", "bfloat16", Page(3, 1, 3, 128 * 64, "bfloat16")),
        ("LBHNC/vec", "float32", Page(3, 1, 3, 128 * 64, "float32")),
        ("LBHNC/vec16", "float16", Page(3, 1, 3, 128 * 64, "float16")),
        ("BLHNC/cuda", "bfloat16", Page(3, 128, 384, 64, "bfloat16")),
        ("BLNHC/cuda", "bfloat16", Page(3, 1, 384, 64, "bfloat16")),
        ("LBHNC/neon", "bfloat16", None),
        ("BHLNC/cuda", "bfloat16", None),
        ("LBHNC/amx", "uint8", None),
        ("LBHNC/amx", "float8_e4m3fn", None),
    ],
)
def test_a_page_is_known_where_its_layout_is(layout: str, dtype: str, page: Page | None) -> None:
    block_bytes = 3 * 128 * 2 * 64 * (4 if dtype == "float32" else 2)
    assert page_of(layout, 3, 128, block_bytes, dtype) == page
    if page:
        assert page.nbytes == block_bytes


def test_a_page_that_does_not_divide_by_its_heads_is_not_known() -> None:
    assert page_of("LBHNC/amx", 0, 128, 98_304, "bfloat16") is None
    assert page_of("LBHNC/amx", 5, 128, 98_304, "bfloat16") is None
    assert page_of("LBHNC/cuda", 3, 128, 3 * 128 * 2 * 8 * 2, "bfloat16") is None  # runs of eight


def test_what_is_no_page_is_a_bug() -> None:
    with pytest.raises(ValueError, match="not a page"):
        Page(3, 1, 4, 64, "bfloat16")
    with pytest.raises(ValueError, match="runs of 60 elements"):
        Page(3, 1, 3, 60, "bfloat16")
