"""Run, not imported: writes one block through vLLM's own CPU kernel and looks where K and V went.

Every packing of keys there is must stay inside its half, so that a scale for a half is a scale for a head.
Prints one line for each packing that was tried; exits with 1 at the first that spills over."""

import sys

import torch
import vllm._custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from cacheengine.codecs import page_of

HEADS, BLOCK, DIM = 3, 128, 64


def halves_hold(dtype: torch.dtype, isa: str) -> bool:
    cache = torch.zeros(2, HEADS, BLOCK, 2 * DIM, dtype=dtype)
    k_half, v_half = cache.view(2, HEADS, 2 * BLOCK, DIM).chunk(2, dim=2)
    key = torch.rand(BLOCK, HEADS, DIM).add(1).to(dtype)
    value = -key - 4
    slots = torch.arange(BLOCK, 2 * BLOCK)
    ops.cpu_attn_reshape_and_cache(
        key, value, k_half, v_half, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    block_bytes = HEADS * BLOCK * 2 * DIM * dtype.itemsize
    page = page_of(f"LBHNC/{isa}", HEADS, BLOCK, block_bytes, str(dtype).removeprefix("torch."))
    if page is None:
        return False
    runs = cache[1].flatten().view(page.pairs, 2, page.run)
    return all(
        torch.equal(runs[head, half].sort().values, written[:, head].flatten().sort().values)
        for head in range(HEADS)
        for half, written in enumerate((key, value))
    )


def main() -> int:
    packings = [
        (dtype, isa) for dtype in (torch.bfloat16, torch.float16, torch.float32) for isa in ("vec", "vec16")
    ]
    if (best := _get_attn_isa(torch.bfloat16, BLOCK, DIM, "auto")) == "amx":
        packings.append((torch.bfloat16, best))
    for dtype, isa in packings:
        if not halves_hold(dtype, isa):
            print(f"{dtype} packed for {isa} is not K and V in halves")
            return 1
        print(f"{dtype} {isa}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
