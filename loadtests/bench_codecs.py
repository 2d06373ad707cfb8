"""What the codecs cost in answers, and what they save in bytes.   python -m loadtests.bench_codecs [--quick]

The question: how far do a model's next-token distributions move when the KV of its prompt went through a
codec?  SmolLM2-135M in float32 arithmetic over a bfloat16 KV cache, so that the codec is the only difference.
The KV of a prompt's first 512 tokens (four vLLM blocks, as its CPU backend lays them out: K and V of a head
side by side) is encoded and decoded by the product's own codecs; then 16 more prompt tokens and the exact
model's greedy continuation of 32 tokens are fed on top.  KL(exact || coded) in nats and "agrees" (same most
likely token) are taken at the 32 positions of the continuation.

The floors: raw must give exactly 0.  For comparison, in torch and not in the product: e4m3 without any scale,
and with the scale amax / 448 instead of a power of two.

The ceiling of encoding is a copy of the same bytes (memcpy, the same cold chunks, one core).
"""

import argparse
import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from cacheengine.arena import Arena
from cacheengine.build import build_cpu
from cacheengine.codecs import CODECS, Codec, Page
from gateway.launch.config import DEFAULT_MODEL
from gateway.launch.model import prepare
from loadtests.report import Bar, finish
from loadtests.texts import MANUAL, slices

BLOCK, BLOCKS, TAIL, CONTINUE = 128, 4, 16, 32  # tokens, blocks, tokens, tokens
PREFIX = BLOCK * BLOCKS
LAYERS, HEADS, DIM = 30, 3, 64
PAGE = Page(HEADS, 1, HEADS, BLOCK * DIM, "bfloat16")
CHUNK_BYTES = LAYERS * 2 * PAGE.nbytes  # 256 tokens
RATIO = {"fp8": 0.501, "k16v8": 0.751}  # bytes stored / bytes of KV, at most
KL = {"fp8": 0.05, "k16v8": 0.02}  # mean over positions, at most
GB_PER_SECOND = 2.0

KV = torch.Tensor  # bfloat16 [layers, K or V, heads, tokens, dim]
Way = Callable[[KV], KV]


@dataclass
class Quality:
    """What one way of storing did to every prompt."""

    kl: list[list[float]] = field(default_factory=list)  # per prompt, per position
    agrees: list[float] = field(default_factory=list)  # per prompt
    error: float = 0.0  # the largest over all K and V

    @property
    def positions(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(self.kl))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.positions)

    def row(self, name: str, ratio: float) -> Sequence[str]:
        each = [statistics.fmean(prompt) for prompt in self.kl]
        p99 = self.positions[int(0.99 * len(self.positions))]
        agree = f"{100 * statistics.fmean(self.agrees):.1f} %"
        return (
            name, f"{ratio:.3f}", f"{self.mean:.2e}", f"{min(each):.1e}–{max(each):.1e}", f"{p99:.1e}",
            agree, f"{self.error:.2g}",
        )  # fmt: skip


def to_slot(kv: KV) -> torch.Tensor:
    """[layer][block][head][K or V][token][dim] as bytes: a chunk of four blocks as it lies in a slot."""
    blocks = kv.unflatten(3, (BLOCKS, BLOCK))
    return blocks.permute(0, 3, 2, 1, 4, 5).contiguous().view(torch.uint8).flatten()


def from_slot(slot: torch.Tensor) -> KV:
    blocks = slot.view(torch.bfloat16).view(LAYERS, BLOCKS, HEADS, 2, BLOCK, DIM)
    return blocks.permute(0, 3, 2, 1, 4, 5).flatten(3, 4)


def through(codec: Codec) -> Way:
    def way(kv: KV) -> KV:
        slot = to_slot(kv)
        back = torch.empty_like(slot)
        small = torch.empty(codec.encoded_bytes(len(slot)), dtype=torch.uint8)
        codec.encode([memoryview(slot.numpy())], [memoryview(small.numpy())])
        codec.decode([memoryview(small.numpy())], [memoryview(back.numpy())])
        return from_slot(back)

    return way


def unscaled(kv: KV) -> KV:
    return kv.float().clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16()


def by_amax(kv: KV) -> KV:
    """Groups as the product has them, the scale as most write it."""
    groups = kv.float().unflatten(3, (BLOCKS, BLOCK))
    scale = groups.abs().amax((4, 5), keepdim=True).clamp(min=1e-30) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16().flatten(3, 4)


class Model:
    """The exact model, and what it says over any KV."""

    def __init__(self, path: Path) -> None:
        transformers_logging.disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
        self._model = loaded.eval()

    def prefill(self, ids: list[int]) -> KV:
        cache = DynamicCache()
        self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
        return torch.stack(pairs).bfloat16()

    def over(self, kv: KV, ids: list[int]) -> torch.Tensor:
        """log-probabilities [CONTINUE, vocabulary] at the last of `ids` behind `kv`."""
        return self._step(self._cache(kv), ids, CONTINUE)

    def greedy(self, kv: KV, ids: list[int], count: int) -> list[int]:
        cache, said = self._cache(kv), []
        for _ in range(count):
            said.append(int(self._step(cache, ids, 1)[-1].argmax()))
            ids = said[-1:]
        return said

    def _step(self, cache: DynamicCache, ids: list[int], last: int) -> torch.Tensor:
        out = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=last)
        return torch.log_softmax(out.logits[0].double(), -1)

    @staticmethod
    def _cache(kv: KV) -> DynamicCache:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(kv.float()):
            cache.update(keys[None], values[None], number)
        return cache


def compare(model: Model, prompts: list[list[int]], ways: dict[str, Way]) -> dict[str, Quality]:
    quality = {name: Quality() for name in ways}
    for number, prompt in enumerate(prompts, 1):
        kv, tail = model.prefill(prompt[:PREFIX]), prompt[PREFIX:]
        said = model.greedy(kv, tail, CONTINUE)
        exact = model.over(kv, tail + said[:-1])
        for name, way in ways.items():
            coded = way(kv)
            near = model.over(coded, tail + said[:-1])
            kl = (exact.exp() * (exact - near)).sum(-1)
            quality[name].kl.append(kl.tolist())
            quality[name].agrees.append((near.argmax(-1) == exact.argmax(-1)).double().mean().item())
            error = (coded.float() - kv.float()).abs().max().item()
            quality[name].error = max(quality[name].error, error)
        print(f"prompt {number} of {len(prompts)}", file=sys.stderr, flush=True)
    return quality


def speeds(codecs: Sequence[Codec], rounds: int) -> dict[str, dict[str, list[float]]]:
    """GB/s of KV (not of encoded bytes), one core, chunks last touched hundreds of megabytes ago."""
    slots = 32
    raw, small = Arena(slots, CHUNK_BYTES), Arena(slots, CHUNK_BYTES)
    noise = torch.randn(CHUNK_BYTES // 2).bfloat16().view(torch.uint8).numpy().tobytes()
    for slot in range(slots):
        raw.view(slot)[:] = noise
        small.view(slot)[:] = noise
    place = itertools.cycle(range(slots))
    found: dict[str, dict[str, list[float]]] = {codec.name: {"encode": [], "decode": []} for codec in codecs}
    found["memcpy"] = {"copy": []}

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return CHUNK_BYTES / (time.perf_counter() - start) / 1e9

    for _ in range(rounds):
        for codec in codecs:
            at = next(place)
            length = codec.encoded_bytes(CHUNK_BYTES)
            whole, coded = [raw.view(at)], [small.view(at)[:length]]
            found[codec.name]["encode"].append(timed(lambda w=whole, c=coded, k=codec: k.encode(w, c)))
            at = next(place)
            whole, coded = [raw.view(at)], [small.view(at)[:length]]
            found[codec.name]["decode"].append(timed(lambda w=whole, c=coded, k=codec: k.decode(c, w)))
        at = next(place)
        to, source = small.address(at), raw.address(at)
        found["memcpy"]["copy"].append(timed(lambda a=to, b=source: ctypes.memmove(a, b, CHUNK_BYTES)))
    return found


def table(title: str, columns: Sequence[str]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("", no_wrap=True)
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 prompts instead of 30")
    quick = parser.parse_args().quick
    build_cpu()
    path = prepare(DEFAULT_MODEL, Path.home() / ".cache" / "cairn").path
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(MANUAL, add_special_tokens=False).ids
    prompts = slices(ids, 4 if quick else 30, PREFIX + TAIL)
    codecs = {name: make(PAGE) for name, make in CODECS.items()}
    torch.set_num_threads(1)  # small steps: threads would mostly wait for each other on a busy machine
    rates = speeds(list(codecs.values()), 60 if quick else 300)
    ways: dict[str, Way] = {"raw": lambda kv: from_slot(to_slot(kv))}
    ways |= {name: through(codec) for name, codec in codecs.items()}
    with torch.inference_mode():
        quality = compare(
            Model(path), prompts, {**ways, "e4m3, no scale": unscaled, "e4m3, amax / 448": by_amax}
        )

    ratio = {name: codec.encoded_bytes(CHUNK_BYTES) / CHUNK_BYTES for name, codec in codecs.items()} | {
        "raw": 1.0
    }
    shown = table(
        f"{len(prompts)} prompts, {CONTINUE} positions each, after {PREFIX} tokens of coded KV",
        ("bytes", "KL mean", "KL of prompts", "KL p99", "agrees", "max error"),
    )
    for name, row in quality.items():
        shown.add_row(*row.row(name, ratio.get(name, 0.5)))
    speed = table("GB/s of KV, one core, cold 5.9 MB chunks", ("median", "p10–p90"))
    results, bars = {}, {}
    for name, verbs in rates.items():
        for verb, values in verbs.items():
            low, *_, high = statistics.quantiles(values, n=10)
            median = statistics.median(values)
            speed.add_row(f"{name} {verb}", f"{median:.2f}", f"{low:.2f}–{high:.2f}")
            results[f"{name}_{verb}_gb_per_second"] = median
            if name in codecs:
                bars[f"{name}_{verb}_gb_per_second"] = Bar(median, GB_PER_SECOND)
    Console(width=110).print(shown, speed)
    bars["raw_kl"] = Bar(max(quality["raw"].positions), 0.0, "lower")
    for name, bar in KL.items():
        bars[f"{name}_kl"] = Bar(quality[name].mean, bar, "lower")
        bars[f"{name}_bytes"] = Bar(ratio[name], RATIO[name], "lower")
    for name, row in quality.items():
        results[f"{name}_kl_mean"] = row.mean
        results[f"{name}_agreement"] = statistics.fmean(row.agrees)
    return finish("codecs", results, bars)


if __name__ == "__main__":
    sys.exit(main())
