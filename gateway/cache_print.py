"""What `cairn lookup`, `warm`, `pin` and `inspect` show a person."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cache_view import Row


def table(rows: Sequence[Row]) -> Table:
    """Chunks by tier, and what a request would find of them."""
    out = Table(box=None, header_style="bold", pad_edge=False)
    out.add_column("worker")
    for name in ("device", "host", "disk", "redis", "hit"):
        out.add_column(name, justify="right")
    for row in rows:
        hit = f"{row.hit} of {row.chunks} chunks, {row.hit * row.chunk_tokens} tokens"
        out.add_row(row.worker, *(str(n) for n in (row.device, row.host, row.disk, row.redis)), hit)
    return out


def card(facts: Mapping[str, Any]) -> Table:
    """One chunk, as lines of name and value."""
    out = Table(box=None, show_header=False, pad_edge=False)
    out.add_row("[bold]chunk[/]", facts["key"])
    out.add_row("model", facts["model"])
    out.add_row("namespace", facts["namespace"])
    out.add_row("pinned", "yes" if facts["pinned"] else "no")
    for worker, tiers in facts["held"].items():
        out.add_row(f"held by {worker}", ", ".join(tiers) or "nowhere of its own")
    for blob in facts["blobs"]:
        out.add_row("[bold]blob[/]", escape(blob["name"]))
        out.add_row("verdict", escape(blob["verdict"]))
        expiry = (
            f"{name} {'never' if ttl is None else f'in {ttl} s'}" for name, ttl in blob["ttl_seconds"].items()
        )
        out.add_row("size, expiry", f"{blob['bytes']} bytes; {', '.join(expiry)}")
        for part in ("metadata", "frame"):
            for name, value in blob.get(part, {}).items():
                out.add_row(f"{part} {name}", escape(str(value)))
    return out


def show(what: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(what)  # a pipe has no width of its own
