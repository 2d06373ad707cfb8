import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cacheengine import ops
from cacheengine.arena import Arena
from cacheengine.build import PACKAGE, build_cpu
from cacheengine.errors import LayoutMismatch
from tests.csrc.moves import (
    CHUNKS,
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

SMALL = SHAPES[5]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    build_cpu()


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(16, 4 * 4 * 3 * 128 * 128 * 2)
    yield arena
    arena.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_leave_one_cache_and_arrive_in_another(shape: Shape) -> None:
    here, there = Cache(shape), Cache(shape)
    there.raw.fill_(0xA5)
    expected = there.twin(shape)
    paged = ops.Paged.of(here.tensors)
    got, want = slots_for(sizes(shape.layers, paged.block_bytes, CHUNKS))

    ops.gather(paged, CHUNKS, got.addresses)
    gather_ref(here.tensors, CHUNKS, want.slots)
    assert_same_bytes(got.raw, want.raw)

    moved = [[b + 1 if b + 1 < shape.blocks else 0 for b in ids] for ids in CHUNKS]  # other blocks there
    ops.scatter(ops.Paged.of(there.tensors), moved, got.addresses)
    scatter_ref(expected.tensors, moved, want.slots)
    assert_same_bytes(there.raw, expected.raw)


def test_threads_move_disjoint_chunks_at_once(arena: Arena) -> None:
    shape = Shape("many blocks", 4, 64, (3, 128, 128), torch.bfloat16)
    here, there = Cache(shape), Cache(shape)
    there.raw[4096:-4096] = 0
    source, target = ops.Paged.of(here.tensors), ops.Paged.of(there.tensors)

    def carry(slot: int) -> None:
        ids = [list(range(slot * 4, slot * 4 + 4))]
        ops.gather(source, ids, [arena.address(slot)])
        ops.scatter(target, ids, [arena.address(slot)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(carry, range(16)))
    assert_same_bytes(there.raw, here.raw)


def test_vllms_cpu_views_are_understood() -> None:
    """4-D views over one int8 allocation, constant layer stride, blocks of 96 KiB (scaled down in layers)."""
    raw = torch.zeros(2 * 5 * 98304, dtype=torch.int8)
    bf16 = raw.view(torch.bfloat16)
    strides = (49152, 16384, 128, 1)
    views = [bf16.as_strided((5, 3, 128, 128), strides, layer * 5 * 49152) for layer in range(2)]

    paged = ops.Paged.of(views)

    assert (paged.block_bytes, paged.block_stride, paged.num_blocks) == (98304, 98304, 5)
    assert paged.bases == (raw.data_ptr(), raw.data_ptr() + 5 * 98304)
    assert paged.chunk_bytes(2) == 2 * 2 * 98304


def test_layers_that_interleave_have_a_wider_block_stride() -> None:
    """BLHNC, one contiguous page a block over all layers: what we ask CUDA backends for."""
    body = torch.zeros(7, 4, 2, 16, 64, dtype=torch.float16)
    paged = ops.Paged.of(list(body.unbind(1)))
    assert paged.block_bytes == 2 * 16 * 64 * 2
    assert paged.block_stride == 4 * paged.block_bytes


def test_a_cache_of_one_block_may_have_any_block_stride() -> None:
    one = torch.zeros(64).as_strided((1, 64), (3, 1))
    assert ops.Paged.of([one]).block_stride == 256


def test_the_paged_cache_keeps_its_tensors_alive() -> None:
    paged = ops.Paged.of([torch.full((4, 100_000), 7, dtype=torch.int8)])
    slot = torch.zeros(100_000, dtype=torch.int8)
    ops.gather(paged, [[3]], [slot.data_ptr()])
    assert (slot == 7).all()


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([], "no layers"),
        ([torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.float16)], "layer 1"),
        ([torch.zeros(4, 8), torch.zeros(5, 8)], "layer 1"),
        ([torch.zeros(4, 8), torch.zeros(8, 8)[::2]], "layer 1"),
        ([torch.zeros(0, 8)], "no blocks"),
        ([torch.zeros(())], "no blocks"),
        ([torch.zeros(4, 8, device="meta")], "device meta"),
        ([torch.zeros(8, 4).t()], "not one run"),  # blocks interleave element by element
        ([torch.zeros(3, 4, 5, 6).transpose(0, 1)[:, :2]], "not one run"),  # heads outside blocks
        ([torch.zeros(4, 16)[:, ::2]], "not one run"),
        ([torch.zeros(8).expand(4, 8)], "overlap"),
        ([torch.zeros(64).as_strided((4, 8), (4, 1))], "overlap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layout_that_cannot_be_moved_safely_is_refused(tensors: list[torch.Tensor], why: str) -> None:
    with pytest.raises(LayoutMismatch, match=why):
        ops.Paged.of(tensors)


def test_what_would_overwrite_itself_is_refused_before_a_byte_moves() -> None:
    cache, slots = Cache(SMALL), Slots([3 * 2 * 105, 3 * 2 * 105])
    before, untouched = cache.raw.clone(), slots.raw.clone()
    paged = ops.Paged.of(cache.tensors)
    first = slots.addresses[0]
    with pytest.raises(ValueError, match="one slot"):
        ops.gather(paged, [[1, 2], [3, 4]], [first, first])
    with pytest.raises(ValueError, match="one block"):
        ops.scatter(paged, [[1, 2], [2, 3]], slots.addresses)
    with pytest.raises(ValueError, match="2 chunks but 1 slots"):
        ops.gather(paged, [[1, 2], [3, 4]], [first])
    with pytest.raises(ValueError, match="block 11 is not in the KV cache"):
        ops.gather(paged, [[1, 2], [3, 11]], slots.addresses)
    with pytest.raises(ValueError, match="not a batch"):
        ops.gather(paged, [[1, 2]], [0])
    assert_same_bytes(cache.raw, before)
    assert_same_bytes(slots.raw, untouched)


def test_one_slot_may_be_scattered_to_several_places() -> None:
    cache, slots = Cache(SMALL), Slots([3 * 105])
    slots.fill()
    ops.scatter(ops.Paged.of(cache.tensors), [[1], [2]], slots.addresses * 2)
    for t in cache.tensors:
        assert torch.equal(t[1], t[2])


def test_an_empty_batch_is_nothing_to_do() -> None:
    paged = ops.Paged.of(Cache(SMALL).tensors)
    ops.gather(paged, [], [])
    ops.scatter(paged, [], [])


def test_without_a_build_the_error_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "cacheengine").mkdir()
    for name in ("__init__", "offline", "ops", "build", "config", "errors"):
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "cacheengine")
    code = "from cacheengine import ops; ops.load()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ConfigError: _kvops.so is not built: run `python -m cacheengine.build`" in ran.stderr
