"""Reference pages written from the code: docs/config.md from fields, docs/metrics.md from declarations.

`python -m gateway.docs` writes them; a test compares.  Metrics are read from the source, not from objects:
a page must not depend on what happens to be importable where it is written.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from cacheengine.config import ALIASES, ENV_PREFIX, CacheConfig, Config
from gateway.config import GatewayConfig
from gateway.launch.config import LaunchConfig

ROOT = Path(__file__).parents[1]
SECTIONS: tuple[tuple[str, str, type[Config]], ...] = (
    ("The stack", "`cairn up`", LaunchConfig),
    ("The gateway", "`cairn gateway`", GatewayConfig),
    ("The cache engine", "each vLLM worker (`cairn worker`, or `kv_connector_extra_config`)", CacheConfig),
)
METRIC_FILES = (
    ("The gateway", "gateway/metrics.py"),
    ("The cache engine, in vLLM's own /metrics", "cacheengine/metrics.py"),
)
_DECLARED = "Metric"  # the engine's table: Metric(name, kind, help, labels)
_KINDS = {"counter": "counter", "gauge": "gauge", "histogram": "histogram", "summary": "summary"}
_NOTE = "<!-- written by `make docs`; edit the code instead -->"


def write() -> list[Path]:
    """Write both pages; returns their paths."""
    pages = {ROOT / "docs" / "config.md": config_page(), ROOT / "docs" / "metrics.md": metrics_page()}
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return list(pages)


def config_page() -> str:
    lines = [
        "# Configuration",
        "",
        _NOTE,
        "",
        "Every process reads its own knobs: defaults, then a YAML file (`--config`, or `CAIRN_CONFIG`), then",
        f"`{ENV_PREFIX}*` environment variables, then flags; the later one wins. The variable of",
        f"`chunk_tokens` is `{ENV_PREFIX}CHUNK_TOKENS`. An unknown key is an error that names the",
        "nearest known one. Sizes take units: `512MiB`, `2GiB`.",
    ]
    for title, process, config in SECTIONS:
        lines += [
            "",
            f"## {title}",
            "",
            f"Read by {process}.",
            "",
            "| knob | default | what it does |",
            "|---|---|---|",
        ]
        for name, field in config.model_fields.items():
            lines.append(
                f"| `{name}` | {default_of(field)} | {_cell(field.description or '')}{_choices(field)} |"
            )
    lines += ["", "## Other spellings", "", "Accepted everywhere, for people who come from LMCache:", ""]
    lines += [f"* `{theirs}` is `{ours}`" for theirs, ours in ALIASES.items()]
    return "\n".join(lines) + "\n"


def default_of(field: FieldInfo) -> str:
    """The default as a person would write it."""
    value = field.get_default(call_default_factory=True)
    if field.annotation is ByteSize or isinstance(value, ByteSize):
        return f"`{_size(int(value))}`"
    if isinstance(value, Enum):
        value = value.value
    if value in ("", None, [], (), {}):
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _size(value: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value and value % (1 << shift) == 0:
            return f"{value >> shift}{unit}"
    return str(value)


def _choices(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return " One of " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation)) + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


@dataclass(frozen=True)
class Metric:
    """One declaration, as its source has it."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]


def metrics_page() -> str:
    lines = ["# Metrics", "", _NOTE, "", "Prometheus names; a histogram adds `_bucket`, `_sum` and `_count`."]
    for title, file in METRIC_FILES:
        path = ROOT / file
        if not path.exists():
            continue
        lines += ["", f"## {title}", "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
        for metric in sorted(declarations(path.read_text()), key=lambda m: m.name):
            labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
            lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {_cell(metric.help)} |")
    return "\n".join(lines) + "\n"


def declarations(source: str) -> Iterator[Metric]:
    """Every `Counter("name", "help", ["label"], …)` or `Metric("name", "counter", "help", …)` of a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == _DECLARED:
            name, kind, text, *labels = (ast.literal_eval(argument) for argument in node.args)
            yield Metric(name, kind, text, tuple(labels[0]) if labels else ())
        elif kind := _kind(node.func):
            given = dict(zip(("name", "documentation", "labelnames"), node.args, strict=False))
            given |= {word.arg: word.value for word in node.keywords if word.arg}
            name, text = _literal(given.get("name")), _literal(given.get("documentation"))
            names = _literal(given.get("labelnames"))
            if isinstance(name, str) and isinstance(text, str):
                if kind == "counter" and not name.endswith("_total"):
                    name += "_total"
                yield Metric(name, kind, text, tuple(names) if isinstance(names, list | tuple) else ())


def _kind(func: ast.expr) -> str:
    """`Counter`, `prom.Gauge` … are metric classes; empty for any other call."""
    called = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    return _KINDS.get(called.lower(), "")


def _literal(node: ast.expr | None) -> object:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


if __name__ == "__main__":
    for written in write():
        sys.stdout.write(f"{written.relative_to(ROOT)}\n")
