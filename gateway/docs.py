"""Reference pages written from the code: docs/config.md from fields, docs/metrics.md from declarations.

`python -m gateway.docs` writes them; a test compares.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from pydantic import ByteSize, SecretStr
from pydantic.fields import FieldInfo

from cacheengine.config import ALIASES, ENV_PREFIX, CacheConfig, Config
from cacheengine.metrics import METRICS
from gateway.config import GatewayConfig
from gateway.launch.config import LaunchConfig
from gateway.metrics import Metrics

ROOT = Path(__file__).parents[1]
SECTIONS: tuple[tuple[str, str, type[Config]], ...] = (
    ("The stack", "`cairn up`", LaunchConfig),
    ("The gateway", "`cairn gateway`", GatewayConfig),
    ("The cache engine", "each vLLM worker (`cairn worker`, or `kv_connector_extra_config`)", CacheConfig),
)
_NOTE = "<!-- written by `make docs`; edit the code instead -->"


def write() -> list[Path]:
    """Write both pages; returns their paths."""
    pages = {ROOT / "docs" / "config.md": config_page(), ROOT / "docs" / "metrics.md": metrics_page()}
    for path, text in pages.items():
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
    if isinstance(value, ByteSize):
        return f"`{_size(int(value))}`"
    if isinstance(value, SecretStr) or value in ("", []):
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


def metrics_page() -> str:
    lines = ["# Metrics", "", _NOTE, "", "Prometheus names; a histogram adds `_bucket`, `_sum` and `_count`."]
    lines += [
        "The gateway also has prometheus-client's `process_*`: CPU seconds, memory, open files, start time."
    ]
    lines += _metrics_table("The gateway", _gateway_metrics())
    lines += _metrics_table("The cache engine, in vLLM's own /metrics", METRICS)
    return "\n".join(lines) + "\n"


def _metrics_table(title: str, metrics: Iterable[tuple[str, str, str, Iterable[str]]]) -> Iterator[str]:
    yield from ("", f"## {title}", "", "| metric | type | labels | meaning |", "|---|---|---|---|")
    for name, kind, text, labels in sorted(metrics):
        named = ", ".join(f"`{label}`" for label in labels) or "–"
        yield f"| `{name}` | {kind} | {named} | {_cell(text)} |"


def _gateway_metrics() -> Iterator[tuple[str, str, str, Iterable[str]]]:
    """Name, type, meaning and labels of each."""
    for declared in vars(Metrics(CollectorRegistry())).values():
        if isinstance(declared, MetricWrapperBase):
            (about,) = declared.describe()
            name = about.name + ("_total" if about.type == "counter" else "")
            yield name, about.type, about.documentation, declared._labelnames


if __name__ == "__main__":
    for written in write():
        sys.stdout.write(f"{written.relative_to(ROOT)}\n")
