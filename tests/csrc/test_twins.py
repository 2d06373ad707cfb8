"""Every native op is a twin: the same suite runs the CPU ops and the CUDA source, compiled for the host."""

import ctypes
import shutil
import subprocess
from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheengine import ops
from cacheengine.build import CSRC, build_cpu
from cacheengine.plan import SKIP
from tests.csrc.moves import (
    CHUNKS,
    POISON,
    SHAPES,
    Cache,
    Shape,
    Slots,
    assert_same_bytes,
    gather_ref,
    scatter_ref,
    sizes,
    slots_for,
)

Twin = Callable[[str, "array[int]"], int]  # (verb, words) -> status

MALFORMED = -1


@pytest.fixture(scope="module", params=["cpu", "cuda source on the host"])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    library = tmp_path_factory.mktemp("native") / "kv.so"
    if request.param == "cpu":
        build_cpu(library)
        calls = ctypes.CDLL(str(library))

        def call(verb: str, words: "array[int]") -> int:
            native = getattr(calls, f"kv_cpu_{verb}")
            native.restype = ctypes.c_int64
            return native(ctypes.c_void_p(words.buffer_info()[0]), ctypes.c_int64(len(words)))

    else:
        emulate(library)
        calls = ctypes.CDLL(str(library))

        def call(verb: str, words: "array[int]") -> int:
            native = getattr(calls, f"kv_cuda_{verb}")
            native.restype = ctypes.c_int64
            at = ctypes.c_void_p(words.buffer_info()[0])
            return native(at, at, ctypes.c_int64(len(words)), None)

    return call


def emulate(library: Path) -> None:
    """Compile csrc/kv_cuda.cu with the C++ compiler: launches become loops."""
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = str(CSRC / "kv_cuda.cu")
    compiler = shutil.which("g++") or "c++"
    subprocess.run([compiler, *flags, "-x", "c++", "-DCUDA_EMU", source, "-o", str(library)], check=True)


def move(twin: Twin, verb: str, paged: ops.Paged, blocks: ops.Blocks, slots: Sequence[int]) -> None:
    ops.raise_for(twin(verb, ops.batch_words(paged, blocks, slots)), blocks)


@pytest.mark.parametrize("shift", [0, 1, 8], ids=lambda n: f"slots shifted by {n}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_fills_exactly_the_named_slots(twin: Twin, shape: Shape, shift: int) -> None:
    cache = Cache(shape)
    before = cache.raw.clone()
    paged = ops.Paged.of(cache.tensors)
    got, want = slots_for(sizes(shape.layers, paged.block_bytes, CHUNKS), shift)

    move(twin, "gather", paged, CHUNKS, got.addresses)
    gather_ref(cache.tensors, CHUNKS, want.slots)

    for mine, reference in zip(got.slots, want.slots, strict=True):
        assert_same_bytes(mine, reference)
    for slot in got.slots:
        slot.fill_(POISON)
    assert_same_bytes(got.raw, torch.full_like(got.raw, POISON))  # not a byte beside the slots
    assert_same_bytes(cache.raw, before)


@pytest.mark.parametrize("shift", [0, 1, 8], ids=lambda n: f"slots shifted by {n}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_touches_no_block_but_the_named(twin: Twin, shape: Shape, shift: int) -> None:
    cache = Cache(shape)
    reference = cache.twin(shape)
    paged = ops.Paged.of(cache.tensors)
    chunks = [[SKIP, 0, 7], [8, SKIP, 1], [2], [SKIP]]  # the others must not change
    slots = Slots(sizes(shape.layers, paged.block_bytes, chunks), shift)
    slots.fill()
    before = slots.raw.clone()

    move(twin, "scatter", paged, chunks, slots.addresses)
    scatter_ref(reference.tensors, chunks, slots.slots)

    assert_same_bytes(cache.raw, reference.raw)
    assert_same_bytes(slots.raw, before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ragged_batch_goes_out_and_comes_back(twin: Twin, data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4), "layers")
    num_blocks = data.draw(st.integers(1, 24), "blocks")
    block_bytes = data.draw(
        st.integers(1, 200) | st.sampled_from([4096, 16383, 16384, 16400, 40000]), "bytes"
    )
    shift = data.draw(st.integers(0, 15), "shift")
    order = data.draw(st.sampled_from(["LB", "BL"]), "order")
    ids = data.draw(st.permutations(range(num_blocks)), "ids")
    cuts = sorted(data.draw(st.lists(st.integers(0, num_blocks), max_size=5), "cuts"))
    chunks = [ids[a:b] for a, b in pairwise([0, *cuts]) if a < b]
    shape = Shape("drawn", layers, num_blocks, (block_bytes,), torch.int8, order=order)
    cache, blank = Cache(shape), Cache(shape)
    blank.raw.fill_(POISON)
    expected = blank.twin(shape)
    slots = Slots(sizes(layers, block_bytes, chunks), shift)

    move(twin, "gather", ops.Paged.of(cache.tensors), chunks, slots.addresses)
    move(twin, "scatter", ops.Paged.of(blank.tensors), chunks, slots.addresses)

    named = [block for chunk in chunks for block in chunk]
    for theirs, ours in zip(expected.tensors, cache.tensors, strict=True):
        theirs[named] = ours[named]
    assert_same_bytes(blank.raw, expected.raw)


@pytest.mark.parametrize("verb", ["gather", "scatter"])
@pytest.mark.parametrize("bad", [-2, 9, 1 << 40, -(1 << 62)])
def test_a_bad_id_anywhere_in_the_batch_moves_nothing(twin: Twin, verb: str, bad: int) -> None:
    cache = Cache(SHAPES[5])
    paged = ops.Paged(ops.Paged.of(cache.tensors).bases, 105, 105, 9)
    before = cache.raw.clone()
    slots = Slots([3 * 2 * 105, 3 * 2 * 105])
    untouched = slots.raw.clone()

    with pytest.raises(ValueError, match=f"block {bad} is not in the KV cache; nothing was moved"):
        move(twin, verb, paged, [[0, 1], [2, bad]], slots.addresses)

    assert_same_bytes(cache.raw, before)
    assert_same_bytes(slots.raw, untouched)


def good_words() -> tuple["array[int]", Cache, Slots]:
    cache, slots = Cache(SHAPES[5]), Slots([3 * 2 * 105, 3 * 105])
    return ops.batch_words(ops.Paged.of(cache.tensors), [[1, 2], [3]], slots.addresses), cache, slots


@pytest.mark.parametrize("verb", ["gather", "scatter"])
def test_a_batch_cut_short_at_any_word_is_refused(twin: Twin, verb: str) -> None:
    words, cache, slots = good_words()
    before, untouched = cache.raw.clone(), slots.raw.clone()
    for length in range(len(words)):
        assert twin(verb, words[:length]) == MALFORMED
    assert_same_bytes(cache.raw, before)
    assert_same_bytes(slots.raw, untouched)
    assert twin(verb, words) == 0


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[(0, n) for n in (0, -1, 1 << 62, 2)],  # layers
        *[(1, n) for n in (-1, 1 << 62, 3)],  # chunks
        *[(2, n) for n in (0, -8, 106)],  # block_bytes, 106 being more than the stride
        *[(3, n) for n in (0, 104)],  # block_stride
        (4, -1),  # num_blocks
        (5, 0),  # base of layer 0
        (8, 0),  # slot of chunk 0
        *[(10, n) for n in (1, -1)],  # first id of chunk 0
        *[(11, n) for n in (4, -1)],  # first id of chunk 1
        *[(12, n) for n in (2, 4)],  # total
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(twin: Twin, word: int, value: int) -> None:
    words, cache, slots = good_words()
    before, untouched = cache.raw.clone(), slots.raw.clone()
    words[word] = value
    assert twin("gather", words) == MALFORMED
    assert twin("scatter", words) == MALFORMED
    assert_same_bytes(cache.raw, before)
    assert_same_bytes(slots.raw, untouched)


def test_chunks_without_blocks_are_nothing_to_do(twin: Twin) -> None:
    cache, slots = Cache(SHAPES[0]), Slots([64, 64])
    before = slots.raw.clone()
    move(twin, "gather", ops.Paged.of(cache.tensors), [[], []], slots.addresses)
    assert_same_bytes(slots.raw, before)


def test_a_gather_has_nothing_to_skip(twin: Twin) -> None:
    cache = Cache(SHAPES[5])
    slots = Slots([3 * 2 * 105])
    with pytest.raises(ValueError, match="block -1 is not in the KV cache"):
        move(twin, "gather", ops.Paged.of(cache.tensors), [[0, SKIP]], slots.addresses)
