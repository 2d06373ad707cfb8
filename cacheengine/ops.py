"""Block moves between a paged KV cache and chunk slots: one native call a batch.

A slot holds a chunk as [layer][block in chunk][block bytes].  Pages are opaque bytes: the CPU backend stores
keys dim-major inside a page, CUDA backends do otherwise, and a copy need not care.

On the CPU a call returns when the bytes are there, and holds no interpreter lock meanwhile.  On CUDA it
enqueues one kernel on the current stream and returns; record an event to learn when the slots may be read.

The native side lives in csrc/ (kv_batch.h says what it assumes).
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Self

import torch

from cacheengine.build import CPU_LIBRARY, CUDA_LIBRARY, load_library
from cacheengine.errors import LayoutMismatch
from cacheengine.plan import SKIP

Blocks = Sequence[Sequence[int]]  # per chunk: the ids of its blocks, in token order

_CUDA_ERROR = -1000  # kv_batch.h, Status: a status at or below is -1000 - cudaError


@dataclass(frozen=True, slots=True)
class Paged:
    """A paged KV cache as addresses.  Block b of layer l is the `block_bytes` bytes at
    bases[l] + b * block_stride, for 0 <= b < num_blocks."""

    bases: tuple[int, ...]
    block_bytes: int
    block_stride: int  # bytes
    num_blocks: int
    device: str = "cpu"  # "cpu" or "cuda:N"
    owner: object = field(default=None, repr=False, compare=False)  # keeps the memory behind `bases` alive

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Self:
        """The cache behind one tensor per layer, dimension 0 being the block.

        Inner dimensions may be permuted, and blocks may lie apart (other layers between them), but a block
        must be one gapless run of bytes.  Raises LayoutMismatch, naming the layer, for anything else.
        """
        if not tensors:
            raise LayoutMismatch("the KV cache has no layers")
        head = tensors[0]
        for layer, t in enumerate(tensors):
            if _layout(t) != _layout(head):
                raise LayoutMismatch(f"layer {layer} is {_layout(t)}, layer 0 is {_layout(head)}")
        if head.device.type not in ("cpu", "cuda"):
            raise LayoutMismatch(f"KV cache on device {head.device}")
        if head.numel() == 0 or head.dim() == 0:
            raise LayoutMismatch(f"KV tensors of shape {tuple(head.shape)} hold no blocks")
        block_bytes = _gapless_elements(head) * head.element_size()
        num_blocks = head.shape[0]
        block_stride = head.stride(0) * head.element_size() if num_blocks > 1 else block_bytes
        if block_stride < block_bytes:
            raise LayoutMismatch(
                f"blocks of {block_bytes} bytes overlap: they are {block_stride} bytes apart"
            )
        bases = tuple(t.data_ptr() for t in tensors)
        return cls(bases, block_bytes, block_stride, num_blocks, str(head.device), tuple(tensors))

    def chunk_bytes(self, blocks: int) -> int:
        """Bytes of a slot that holds a chunk of `blocks` blocks."""
        return len(self.bases) * blocks * self.block_bytes


def gather(paged: Paged, blocks: Blocks, slots: Sequence[int]) -> None:
    """Copy the blocks of chunk i, all layers, to the slot at address slots[i].

    REQUIRES every address to be a slot of `paged.chunk_bytes(len(blocks[i]))` bytes that nobody else writes;
    on CUDA pinned or device memory.
    Raises ValueError before any byte moves: an id outside the cache, lengths that differ, a slot named twice.
    """
    if len(set(slots)) != len(slots):
        raise ValueError("two chunks cannot be gathered into one slot")
    _move("gather", paged, blocks, slots)


def scatter(paged: Paged, blocks: Blocks, slots: Sequence[int]) -> None:
    """Copy the slot at address slots[i] to the blocks of chunk i, all layers.  No other block is touched.

    A block id of SKIP leaves that part of the slot where it is: the device holds the block already, and
    somebody may be reading it.  REQUIRES and raises as gather(); a block named twice is the ValueError here.
    """
    ids = [block for block in chain.from_iterable(blocks) if block != SKIP]
    if len(set(ids)) != len(ids):
        raise ValueError("two chunks cannot be scattered to one block")
    _move("scatter", paged, blocks, slots)


def load() -> None:
    """Load the CPU ops now rather than in the first step.  Raises ConfigError when they are not built."""
    _library(CPU_LIBRARY)


def batch_words(paged: Paged, blocks: Blocks, slots: Sequence[int]) -> "array[int]":
    """The batch as the native side reads it (csrc/kv_batch.h).  Raises ValueError for unequal lengths."""
    if len(blocks) != len(slots):
        raise ValueError(f"{len(blocks)} chunks but {len(slots)} slots")
    words = array(
        "q", (len(paged.bases), len(slots), paged.block_bytes, paged.block_stride, paged.num_blocks)
    )
    words.extend(paged.bases)
    words.extend(slots)
    words.extend(accumulate(map(len, blocks), initial=0))
    words.extend(chain.from_iterable(blocks))
    return words


def raise_for(status: int, blocks: Blocks) -> None:
    """Turn a native status into the error it means."""
    if status > 0:
        bad = list(chain.from_iterable(blocks))[status - 1]
        raise ValueError(f"block {bad} is not in the KV cache; nothing was moved")
    if status <= _CUDA_ERROR:
        raise RuntimeError(f"CUDA error {_CUDA_ERROR - status} when launching a block move")
    if status < 0:
        raise ValueError(f"not a batch of block moves (native status {status}); nothing was moved")


def _move(verb: str, paged: Paged, blocks: Blocks, slots: Sequence[int]) -> None:
    words = batch_words(paged, blocks, slots)
    if not slots:
        return
    if paged.device == "cpu":
        call = getattr(_library(CPU_LIBRARY), f"kv_cpu_{verb}")
        raise_for(call(words.buffer_info()[0], len(words)), blocks)
        return
    call = getattr(_library(CUDA_LIBRARY), f"kv_cuda_{verb}")
    stream = torch.cuda.current_stream(torch.device(paged.device))
    with torch.cuda.stream(stream):
        # Both copies of the tables may be freed at return: torch reuses the pinned one only after the copy,
        # and the device one only behind the kernel on this very stream.
        host = torch.frombuffer(words, dtype=torch.int64).pin_memory()
        device = host.to(paged.device, non_blocking=True)
        raise_for(call(host.data_ptr(), device.data_ptr(), len(words), stream.cuda_stream), blocks)


@cache
def _library(path: Path) -> ctypes.CDLL:
    """A native library with its signatures."""
    library = load_library(path)
    pointer, length = ctypes.c_void_p, ctypes.c_int64
    cpu = path == CPU_LIBRARY
    for verb in ("gather", "scatter"):
        call = getattr(library, f"kv_cpu_{verb}" if cpu else f"kv_cuda_{verb}")
        call.argtypes = [pointer, length] if cpu else [pointer, pointer, length, pointer]
        call.restype = ctypes.c_int64
    return library


def _layout(t: torch.Tensor) -> tuple[object, ...]:
    return t.dtype, tuple(t.shape), t.stride(), str(t.device)


def _gapless_elements(t: torch.Tensor) -> int:
    """Elements in one block.  Raises LayoutMismatch unless they are one run in memory."""
    elements = 1
    for dim in sorted(range(1, t.dim()), key=t.stride):  # innermost in memory first
        if t.shape[dim] == 1:
            continue
        if t.stride(dim) != elements:
            raise LayoutMismatch(f"a block is not one run of memory: {tuple(t.shape)}, strides {t.stride()}")
        elements *= t.shape[dim]
    return elements
