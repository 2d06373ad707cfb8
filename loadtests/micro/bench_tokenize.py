"""Foretelling a prompt's tokens.   python -m loadtests.micro.bench_tokenize --model FOLDER [--quick]

The question: what does the gateway pay per request to turn a chat into token ids and chunk keys, cold, and
when it has seen all but the newest turn?
The ceiling: tiktoken's compiled encoder alone on the same rendered text; no template, no memo, no keys.
The rival: `tokenizers`, which is what the worker itself uses.
"""

import argparse
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cacheengine.keys import KeyScheme, namespace_of
from gateway.ask import Ask
from gateway.encoders import BpeEncoder
from gateway.tokenize import ModelTokenizer
from loadtests.report import Bar, finish

TEXT = "\n".join(pydoc_data.topics.topics.values())
SCHEME = KeyScheme(namespace_of({"bench": "tokenize"}), 256)
TURNS = 8
SIZES = {"1KB": 1_000, "8k tokens": 31_000, "32k tokens": 124_000}


def chat(chars: int, salt: int) -> Ask:
    """A conversation of `chars` characters in TURNS turns; `salt` makes every turn's text its own."""
    step = chars // TURNS
    texts = [f"{salt} {TEXT[at : at + step]}" for at in range(0, step * TURNS, step)]
    return Ask(
        messages=[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    )


def grown(ask: Ask, salt: int) -> Ask:
    """The same conversation, a short turn later."""
    return Ask(messages=[*ask.messages, {"role": "user", "content": f"And then {salt}?"}])


def timed(work: Callable[[Any], object], inputs: list[Any]) -> float:
    """Median milliseconds of one call."""
    took = []
    for given in inputs:
        start = time.perf_counter()
        work(given)
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took)


def measure(model: ModelTokenizer, fast: BpeEncoder, chars: int, rounds: int) -> dict[str, float]:
    template = model.templates["default"]
    cold = [chat(chars, salt) for salt in range(rounds)]
    texts = [template.render(ask) for ask in cold]
    out = {
        "ceiling_ms": timed(fast.bpe.encode_ordinary, texts),
        "tokenizers_ms": timed(lambda text: fast.plain.encode(text, False), texts),
        "render_ms": timed(template.render, cold),
        "cold_ms": timed(lambda ask: SCHEME.keys(model.chat(ask).ids), cold),
        "warm_ms": timed(lambda ask: SCHEME.keys(model.chat(ask).ids), [grown(ask, 7) for ask in cold]),
    }
    out["tokens"] = len(model.chat(cold[0]).ids)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--model", type=Path, default=Path.home() / ".cache" / "cairn" / "models" / "SmolLM2-135M-Instruct",
        help="a folder with tokenizer.json and a chat template (`cairn model prepare` makes one)",
    )  # fmt: skip
    args = parser.parse_args()
    model = ModelTokenizer.load(args.model, 256 << 20)
    if not isinstance(model.encoder, BpeEncoder):
        print(f"this model is not tokenized with tiktoken: {model.note}")
        return 2
    results: dict[str, float] = {}
    for name, chars in SIZES.items():
        found = measure(model, model.encoder, chars, 10 if args.quick else 50)
        print(f"{name}: " + "  ".join(f"{key} {value:,.2f}" for key, value in found.items()))
        results |= {f"{name} {key}": value for key, value in found.items()}
        if name == "8k tokens":
            middle = found
    bars = {
        "tokenizers / cold, 8k tokens": Bar(middle["tokenizers_ms"] / middle["cold_ms"], 3.0, "higher"),
        "cold / ceiling, 8k tokens": Bar(middle["cold_ms"] / middle["ceiling_ms"], 2.0, "lower"),
        "warm ms, 8k tokens": Bar(middle["warm_ms"], 1.0, "lower"),
    }
    return finish("tokenize", results, bars)


if __name__ == "__main__":
    sys.exit(main())
