"""The codecs' twins against torch's own cast: the same suite runs every CPU variant and the CUDA source.

Equal to the last bit, for every kind of float there is."""

import ctypes
import shutil
import subprocess
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheengine.build import CSRC, build_cpu
from cacheengine.codecs import CODECS, Fp8, Page
from tests.csrc import codec_reference as reference
from tests.csrc.codec_reference import DTYPES
from tests.csrc.moves import POISON, assert_same_bytes

Twin = Callable[[str, "array[int]"], int]  # (verb, words) -> status

MALFORMED = -1
GUARD = 64
LEVELS = {"cpu, baseline": 0, "cpu, AVX2": 1, "cpu, AVX-512": 2}
PAGES = {
    "vllm cpu smollm2": Page(3, 1, 3, 128 * 64, "bfloat16"),
    "head by head fp16": Page(2, 1, 2, 32 * 80, "float16"),
    "head by head fp32": Page(3, 1, 3, 32 * 64, "float32"),
    "cuda, tokens in heads bf16": Page(4, 16, 64, 128, "bfloat16"),
    "cuda, heads in tokens fp16": Page(4, 1, 64, 64, "float16"),
    "cuda, heads in tokens fp32": Page(2, 1, 32, 16, "float32"),
    "one vector": Page(1, 1, 1, 16, "bfloat16"),
}
# What a group holds besides noise, as float64; each dtype makes of it what it can.
KINDS_OF_NUMBERS = {
    "noise": [],
    "zeros, infinities, NaN": [0.0, -0.0, float("inf"), -float("inf"), float("nan")],
    "huge": [3.4e38, -3.3e38, 65504.0, -65503.0, 1e30],
    "denormal": [1e-40, -1e-45, 6e-8, -1e-7, 5.9e-39],
    "around the limit": [448.0, 449.0, 464.0, 479.0, -480.0, 255.0, 1.75, 1.7578125],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference is many small torch calls: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("native") / "kv.so"
    build_cpu(library)
    return library


@pytest.fixture(scope="module", params=[*LEVELS, "cuda source on the host"])
def twin(request: pytest.FixtureRequest, cpu_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    library = cpu_library
    if request.param in LEVELS:
        calls, level = ctypes.CDLL(str(library)), LEVELS[request.param]

        def call(verb: str, words: "array[int]") -> int:
            native = getattr(calls, f"kv_cpu_{verb}")
            native.restype = ctypes.c_int64
            at = ctypes.c_void_p(words.buffer_info()[0])
            return native(at, ctypes.c_int64(len(words)), ctypes.c_int64(level))

        nothing = array("q", [3, 0, 1, 1, 1, 16, 0])
        if call("encode", nothing) == MALFORMED:
            pytest.skip(f"LOUD: this processor has no {request.param}, THAT VARIANT IS NOT CHECKED")
    else:
        library = tmp_path_factory.mktemp("native") / "emulated.so"
        emulate(library)
        calls = ctypes.CDLL(str(library))

        def call(verb: str, words: "array[int]") -> int:
            native = getattr(calls, f"kv_cuda_{verb}")
            native.restype = ctypes.c_int64
            at = ctypes.c_void_p(words.buffer_info()[0])
            return native(at, at, ctypes.c_int64(len(words)), None)

    return call


def emulate(library: Path) -> None:
    """Compile csrc/kv_codec.cu with the C++ compiler: launches become loops."""
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = str(CSRC / "kv_codec.cu")
    compiler = shutil.which("g++") or "c++"
    subprocess.run([compiler, *flags, "-x", "c++", "-DCUDA_EMU", source, "-o", str(library)], check=True)


class Buffer:
    """A 64-byte aligned piece of poisoned memory with guards on both sides."""

    def __init__(self, size: int) -> None:
        self.raw = torch.full((size + 2 * GUARD + 64,), POISON, dtype=torch.uint8)
        start = GUARD + (-self.raw.data_ptr() - GUARD) % 64
        self.body = self.raw[start : start + size]

    @property
    def view(self) -> memoryview:
        return memoryview(self.body.numpy())

    def assert_guards(self) -> None:
        self.body.fill_(POISON)
        assert_same_bytes(self.raw, torch.full_like(self.raw, POISON))


def codec_for(name: str, page: Page) -> Fp8 | None:
    """None where the codec refuses the page."""
    if name == "k16v8" and page.dtype == "float32":
        return None
    made = CODECS[name](page)
    assert isinstance(made, Fp8)
    return made


def values(page: Page, pages: int, special: list[float], seed: int) -> torch.Tensor:
    """Flat uint8: noise over many magnitudes, with `special` numbers strewn in."""
    g = torch.Generator().manual_seed(seed)
    count = 2 * pages * page.pairs * page.run
    magnitude = torch.randint(-9, 5, (count // 16, 1), generator=g).double()
    noise = torch.randn(count // 16, 16, generator=g, dtype=torch.float64) * 10**magnitude
    flat = noise.flatten()
    if special:
        at = torch.randint(0, count, (max(len(special), count // 20),), generator=g)
        flat[at] = torch.tensor(special, dtype=torch.float64).repeat(len(at) // len(special) + 1)[: len(at)]
    return flat.to(DTYPES[page.dtype]).view(torch.uint8)


def check(twin: Twin, codec: Fp8, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Encode and decode a batch, both compared with torch's; returns what was decoded."""
    page = codec.page
    raws = [Buffer(len(chunk)) for chunk in chunks]
    for raw, chunk in zip(raws, chunks, strict=True):
        raw.body.copy_(chunk)
    coded = [Buffer(codec.encoded_bytes(len(chunk))) for chunk in chunks]
    back = [Buffer(len(chunk)) for chunk in chunks]
    raw_views, coded_views = [b.view for b in raws], [b.view for b in coded]
    assert twin("encode", codec.words(raw_views, coded_views, raw_views)) == 0
    expected = [reference.encode(page, codec.name, chunk) for chunk in chunks]
    for mine, want in zip(coded, expected, strict=True):
        assert_same_bytes(mine.body, want)
    back_views = [b.view for b in back]
    assert twin("decode", codec.words(coded_views, back_views, back_views)) == 0
    decoded = [buffer.body.clone() for buffer in back]
    for mine, want, chunk in zip(decoded, expected, chunks, strict=True):
        assert_same_bytes(mine, reference.decode(page, codec.name, want, len(chunk) // page.nbytes))
    for raw, chunk in zip(raws, chunks, strict=True):
        assert_same_bytes(raw.body, chunk)
    del raw_views, coded_views, back_views
    for buffer in (*raws, *coded, *back):
        buffer.assert_guards()
    return decoded


@pytest.mark.parametrize("numbers", KINDS_OF_NUMBERS)
@pytest.mark.parametrize("shape", PAGES)
@pytest.mark.parametrize("name", ["fp8", "k16v8"])
def test_every_twin_rounds_as_torch_does(twin: Twin, name: str, shape: str, numbers: str) -> None:
    page = PAGES[shape]
    if (codec := codec_for(name, page)) is None:
        return  # what it refuses is said in tests/cacheengine/test_codecs.py
    check(twin, codec, [values(page, n, KINDS_OF_NUMBERS[numbers], n) for n in (1, 2)])


@pytest.mark.parametrize("limit", [0x0001, 0x0080, 0x3C00, 0x43E0, 0x43E1, 0x7F7F])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_number_under_every_sort_of_amax(twin: Twin, dtype: str, limit: int) -> None:
    """All 65,536 patterns in one group, clipped to `limit`; what is not finite stays in."""
    page = Page(1, 1, 1, 65_536, dtype)
    patterns = torch.arange(65_536, dtype=torch.int32)
    infinite = 0x7F80 if dtype == "bfloat16" else 0x7C00
    size = patterns & 0x7FFF
    clipped = torch.where(size < infinite, size.clamp(max=min(limit, infinite - 1)), size)
    words = (clipped | (patterns & 0x8000)).to(torch.int16)
    codec = codec_for("fp8", page)
    assert codec is not None
    check(twin, codec, [torch.cat([words, words.flip(0)]).view(torch.uint8)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_any_page_are_coded_as_torch_codes_them(twin: Twin, data: st.DataObject) -> None:
    """Random bytes are every exponent, NaNs with payloads, denormals: nothing a float can be is left out."""
    dtype = data.draw(st.sampled_from(sorted(DTYPES)), "dtype")
    heads, inner = data.draw(st.integers(1, 5), "heads"), data.draw(st.integers(1, 5), "inner")
    pairs = heads * inner * data.draw(st.integers(1, 4), "outer")
    page = Page(heads, inner, pairs, 16 * data.draw(st.integers(1, 20), "vectors"), dtype)
    codec = codec_for(data.draw(st.sampled_from(["fp8", "k16v8"]), "codec"), page)
    if codec is None:
        return
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 40), "seed"))
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4), "pages")
    chunks = [torch.randint(0, 256, (n * page.nbytes,), dtype=torch.uint8, generator=g) for n in counts]
    check(twin, codec, chunks)


@pytest.mark.parametrize("shape", PAGES)
@pytest.mark.parametrize("name", ["fp8", "k16v8"])
def test_coding_what_was_decoded_changes_nothing(twin: Twin, name: str, shape: str) -> None:
    """A chunk may go down and come up any number of times: it loses once."""
    page = PAGES[shape]
    if (codec := codec_for(name, page)) is None:
        return
    numbers = [n for special in KINDS_OF_NUMBERS.values() for n in special]
    once = check(twin, codec, [values(page, 4, numbers, 1), values(page, 1, [], 2)])
    for first, second in zip(once, check(twin, codec, once), strict=True):
        assert_same_bytes(second, first)


def test_any_bytes_decode_to_something(twin: Twin) -> None:
    """A header that no encoder writes is still only numbers: no fault, no write beside the page."""
    for page in PAGES.values():
        for name in ("fp8", "k16v8"):
            if (codec := codec_for(name, page)) is None:
                continue
            back = Buffer(2 * page.nbytes)
            junk = Buffer(codec.encoded_bytes(2 * page.nbytes))
            for fill in (0x00, 0x7F, 0x80, 0xFF):
                junk.body.fill_(fill)
                views = [back.view]
                assert twin("decode", codec.words([junk.view], views, views)) == 0
            del views
            back.assert_guards()


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_what_is_not_a_batch_is_refused_before_any_byte_moves(twin: Twin, verb: str) -> None:
    page = PAGES["one vector"]
    codec = codec_for("fp8", page)
    assert codec is not None
    raw, coded = Buffer(page.nbytes), Buffer(codec.encoded_bytes(page.nbytes))
    sides = ([raw.view], [coded.view]) if verb == "encode" else ([coded.view], [raw.view])
    good = codec.words(*sides, [raw.view])
    for length in range(len(good)):
        assert twin(verb, good[:length]) == MALFORMED
    spoiled = [
        *(
            (0, 0),
            (0, 4),
            (1, -1),
            (1, 3),
            (2, 0),
            (3, 0),
            (4, 0),
            (4, 1 << 40),
            (5, 0),
            (5, 24),
            (5, 1 << 60),
        ),
        *((6, -1), (6, 2), (6, 1 << 62), (7, 0), (8, 0), (7, good[7] + 1), (8, good[8] + 8)),
        *((9, -1), (9, 1 << 60)),
    ]
    for at, bad in spoiled:
        words = array("q", good)
        words[at] = bad
        assert twin(verb, words) == MALFORMED, (at, bad)
    for buffer in (raw, coded):
        assert_same_bytes(buffer.body, torch.full_like(buffer.body, POISON))
    assert twin(verb, good) == 0
