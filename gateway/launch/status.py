"""`cairn status`: what the gateway knows about its workers, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from rich.table import Table

from gateway.launch.errors import LaunchError

Worker = Mapping[str, Any]  # one worker of GET /admin/workers, with its heartbeat


def fetch_workers(url: str, timeout_seconds: float = 5.0) -> list[dict[str, Any]]:
    """GET /admin/workers of the gateway at `url`.  Raises LaunchError when it does not answer."""
    try:
        reply = httpx.get(f"{url.rstrip('/')}/admin/workers", timeout=timeout_seconds, trust_env=False)
        reply.raise_for_status()
        body = reply.json()
    except httpx.TransportError:
        raise LaunchError(
            f"no gateway answers at {url}; start one with `make up` or name it with --url"
        ) from None
    except (httpx.HTTPStatusError, ValueError) as exc:
        raise LaunchError(f"{url} answers, but not as a Cairn gateway ({exc})") from None
    rows = body.get("workers", []) if isinstance(body, dict) else body
    return [flat(row) for row in rows]


def flat(row: Worker) -> dict[str, Any]:
    """A worker with the fields of its heartbeat beside its own."""
    return {**(row.get("load") or {}), **(row.get("beat") or {}), **row}


def number(worker: Worker, name: str) -> float | None:
    """A heartbeat field; None when the worker does not report it."""
    value = worker.get(name)
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def state_of(worker: Worker) -> str:
    """ready, down, draining, drained, or stale: ready, but its heartbeat is not heard."""
    state = str(worker.get("state", "?"))
    return "stale" if state == "ready" and worker.get("stale") else state


def trust_of(worker: Worker) -> str:
    """Whether the index was right about it lately: exact, stale (not believed), or a dash."""
    parts = worker.get("trust") or {}
    states = [str(part.get("state", "")).lower() for part in parts.values()]
    return next((state for state in ("stale", "exact") if state in states), "–")


def fill(worker: Worker, tier: str) -> str:
    """`37 % of 182` chunks; a dash for a tier the worker does not have."""
    used, slots = number(worker, f"{tier}_used"), number(worker, f"{tier}_slots")
    if not slots:
        return "–"
    return f"{100 * (used or 0) / slots:.0f} % of {slots:.0f}"


def hit_rate(worker: Worker) -> float | None:
    """Share of prompt tokens that came from a cache tier it started; None before the first prompt."""
    asked = number(worker, "lookup_tokens")
    if not asked:
        return None
    hits = sum(number(worker, name) or 0.0 for name in worker if name.startswith("hit_tokens_"))
    return min(1.0, hits / asked)


def summary(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """The rows of the table as plain data, for --json."""
    return [
        {
            "id": worker.get("id", "?"),
            "url": worker.get("url", ""),
            "model": worker.get("model", ""),
            "state": state_of(worker),
            "running": number(worker, "running"),
            "waiting": number(worker, "waiting"),
            "host": fill(worker, "host"),
            "disk": fill(worker, "disk"),
            "hit_rate": hit_rate(worker),
            "trust": trust_of(worker),
        }
        for worker in workers
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    out = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (
        "worker",
        "state",
        "running",
        "waiting",
        "host tier",
        "disk tier",
        "hit rate",
        "index",
        "model",
    ):
        numeric = heading in ("running", "waiting", "hit rate")
        out.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        colour = {"ready": "green", **dict.fromkeys(("stale", "draining", "drained"), "yellow")}.get(
            row["state"], "red"
        )
        rate = "–" if row["hit_rate"] is None else f"{100 * row['hit_rate']:.0f} %"
        out.add_row(
            str(row["id"]),
            f"[{colour}]{row['state']}[/]",
            _count(row["running"]),
            _count(row["waiting"]),
            row["host"],
            row["disk"],
            rate,
            str(row["trust"]),
            str(row["model"]),
        )
    return out


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
