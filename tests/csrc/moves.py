"""Paged caches and slots whose every byte is accounted for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cacheengine.ops import Blocks
from cacheengine.plan import SKIP

POISON = 0xA5
GUARD = 4096  # poisoned bytes on each side of everything


@dataclass(frozen=True)
class Shape:
    """How a KV cache lies in memory, as vLLM names it: L layers, B blocks, the rest inside a block."""

    name: str
    layers: int
    blocks: int
    inner: tuple[int, ...]
    dtype: torch.dtype
    order: str = "LB"  # "BL": the layers of a block lie together
    swapped: bool = False  # the first two inner dimensions are a transposed view (token-major pages)

    def __str__(self) -> str:
        return self.name


SHAPES = [
    Shape("vllm cpu smollm2 bf16", 4, 9, (3, 128, 128), torch.bfloat16),
    Shape("gqa 16-token fp16", 3, 40, (8, 16, 128), torch.float16),
    Shape("gqa token-major bf16", 3, 12, (8, 16, 128), torch.bfloat16, swapped=True),
    Shape("layers of a block together bf16", 3, 12, (8, 16, 128), torch.bfloat16, order="BL"),
    Shape("mla fp32", 2, 10, (1, 16, 576), torch.float32),
    Shape("nothing divides it, int8", 3, 11, (3, 5, 7), torch.int8),
    Shape("four bytes, fp32", 2, 9, (1,), torch.float32),
    Shape("streamed, with a ragged end, int8", 2, 9, (4 * 4096 * 2 + 37,), torch.int8),
]
# Ragged on purpose: a tail chunk has fewer blocks than its neighbours.
CHUNKS = [[5, 0, 7, 2], [8, 3, 1, 6], [4]]


class Cache:
    """Random KV tensors, one per layer, cut from one guarded allocation."""

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        elements = torch.Size(shape.inner).numel()
        page = elements * shape.dtype.itemsize
        generator = torch.Generator().manual_seed(7)
        size = 2 * GUARD + shape.layers * shape.blocks * page
        self.raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        self.raw[:GUARD] = self.raw[-GUARD:] = POISON
        self.raw = self.raw.to(device)
        body = self.raw[GUARD:-GUARD].view(shape.dtype)
        outer, axis = (
            ((shape.layers, shape.blocks), 0) if shape.order == "LB" else ((shape.blocks, shape.layers), 1)
        )
        inner = shape.inner
        if shape.swapped:
            inner = (inner[1], inner[0], *inner[2:])
        layers = body.view(*outer, *inner).unbind(axis)
        self.tensors = [t.transpose(1, 2) for t in layers] if shape.swapped else list(layers)

    def twin(self, shape: Shape) -> "Cache":
        """An independent copy with the same bytes."""
        other = Cache(shape, str(self.raw.device))
        other.raw.copy_(self.raw)
        return other


class Slots:
    """One poisoned buffer with a slot for each chunk, `shift` bytes off alignment, gaps between them."""

    def __init__(self, sizes: Sequence[int], shift: int = 0, pinned: bool = False) -> None:
        strides = [-(-size // 64) * 64 + 64 for size in sizes]
        self.raw = torch.full((2 * GUARD + sum(strides),), POISON, dtype=torch.uint8, pin_memory=pinned)
        start = GUARD + (-self.raw.data_ptr()) % 64 + shift
        self.slots = []
        for size, stride in zip(sizes, strides, strict=True):
            self.slots.append(self.raw[start : start + size])
            start += stride

    @property
    def addresses(self) -> list[int]:
        return [slot.data_ptr() for slot in self.slots]

    def fill(self) -> None:
        generator = torch.Generator().manual_seed(11)
        for slot in self.slots:
            slot.copy_(torch.randint(0, 256, slot.shape, dtype=torch.uint8, generator=generator))


def slots_for(chunk_bytes: Sequence[int], shift: int = 0) -> tuple[Slots, Slots]:
    """Two equal sets: one for the op, one for its reference."""
    return Slots(chunk_bytes, shift), Slots(chunk_bytes, shift)


def sizes(layers: int, block_bytes: int, blocks: Blocks) -> list[int]:
    return [layers * len(ids) * block_bytes for ids in blocks]


def assert_same_bytes(got: torch.Tensor, want: torch.Tensor) -> None:
    """A copy is bitwise or it is wrong."""
    wrong = (got.cpu() != want.cpu()).nonzero().flatten()
    first = int(wrong[0]) if len(wrong) else -1
    assert not len(wrong), f"{len(wrong)} of {len(got)} bytes differ, the first at {first}"


def gather_ref(tensors: Sequence[torch.Tensor], blocks: Blocks, slots: Sequence[torch.Tensor]) -> None:
    """What ops.gather() means, in plain torch.  `slots` are flat uint8 tensors."""
    for ids, slot in zip(blocks, slots, strict=True):
        slot.copy_(torch.cat([pages(t)[list(ids)].flatten() for t in tensors]))


def scatter_ref(tensors: Sequence[torch.Tensor], blocks: Blocks, slots: Sequence[torch.Tensor]) -> None:
    """What ops.scatter() means, in plain torch.  `slots` are flat uint8 tensors."""
    for ids, slot in zip(blocks, slots, strict=True):
        fresh = [row for row, block in enumerate(ids) if block != SKIP]
        for t, rows in zip(tensors, slot.view(len(tensors), len(ids), -1), strict=True):
            pages(t)[[ids[row] for row in fresh]] = rows[fresh]


def pages(t: torch.Tensor) -> torch.Tensor:
    """uint8 view [blocks, block_bytes] in memory order."""
    return t.permute(0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)).flatten(1).view(torch.uint8)
