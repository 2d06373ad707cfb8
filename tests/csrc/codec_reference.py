"""What the scaled codecs mean, in plain torch: its own float8_e4m3fn cast does the rounding."""

import torch

from cacheengine.codecs import Page

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CODED = {"fp8": (True, True), "k16v8": (False, True)}  # K, V


def groups(page: Page, raw: torch.Tensor) -> torch.Tensor:
    """[pages, outer, heads, inner, K or V, run] over the elements of whole pages; `raw` is flat uint8."""
    outer = page.pairs // (page.heads * page.inner)
    return raw.view(DTYPES[page.dtype]).view(-1, outer, page.heads, page.inner, 2, page.run)


def amaxes(page: Page, raw: torch.Tensor) -> torch.Tensor:
    """float32 [pages, heads, K or V]: the largest finite size."""
    sizes = groups(page, raw).float().abs()
    return torch.where(sizes.isfinite(), sizes, 0.0).amax((1, 3, 5))


def scales(amax: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that brings amax within 448; float32 has no normal one below 2^-126."""
    mantissa, exponent = torch.frexp(amax.double())  # in [0.5, 1)
    exponent = exponent - 9 + (mantissa > 0.875).int()
    exponent = torch.where(amax == 0, -126, exponent).clamp(min=-126)
    return torch.ldexp(torch.ones_like(amax), exponent)


def encode(page: Page, codec: str, raw: torch.Tensor) -> torch.Tensor:
    """Flat uint8 -> flat uint8."""
    values = groups(page, raw)
    amax = amaxes(page, raw)
    scaled = values.float() / scales(amax)[:, None, :, None, :, None]
    small = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    small = torch.where(values.isfinite(), small, 0x7F)
    halves = [h for h in (0, 1) if CODED[codec][h]]
    head = amax[:, :, halves].flatten(1).contiguous().view(torch.uint8)
    head = torch.nn.functional.pad(head, (0, -head.shape[1] % 16))
    bodies = [
        small[..., half, :] if half in halves else values[..., half, :].contiguous().view(torch.uint8)
        for half in (0, 1)
    ]
    body = torch.cat(bodies, -1).flatten(1)
    return torch.cat([head, body], 1).flatten()


def decode(page: Page, codec: str, coded: torch.Tensor, pages: int) -> torch.Tensor:
    """Flat uint8 -> flat uint8."""
    dtype = DTYPES[page.dtype]
    halves = [h for h in (0, 1) if CODED[codec][h]]
    rows = coded.view(pages, -1)
    head_bytes = 4 * page.heads * len(halves)
    amax = rows[:, :head_bytes].contiguous().view(torch.float32).view(pages, page.heads, len(halves))
    scale = scales(amax)[:, None, :, None, :, None]  # [pages, 1, heads, 1, halves, 1]
    outer = page.pairs // (page.heads * page.inner)
    body = rows[:, head_bytes + -head_bytes % 16 :].reshape(pages, outer, page.heads, page.inner, -1)
    out, at = [], 0
    for half in (0, 1):
        width = page.run * (1 if half in halves else page.width)
        part, at = body[..., at : at + width].contiguous(), at + width
        if half in halves:
            values = part.view(torch.float8_e4m3fn).float() * scale[..., halves.index(half), :]
            limit = torch.finfo(dtype).max
            values = values.clamp(-limit, limit).to(dtype)
            part = torch.where(values.isnan(), torch.nan, values).contiguous().view(torch.uint8)
        out.append(part)
    return torch.cat(out, -1).flatten()
