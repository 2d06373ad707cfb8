"""`cairn status`: what the gateway knows about its workers, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from pydantic import SecretStr
from rich.table import Table

from gateway.launch.errors import LaunchError

NO_TOKEN = SecretStr("")

Worker = Mapping[str, Any]  # one worker of GET /admin/workers, with its heartbeat

_COLUMNS = {
    "worker": False,  # whether it is a number
    "state": False,
    "running": True,
    "waiting": True,
    "host tier": False,
    "disk tier": False,
    "from\ncache": True,
    "from\ndevice": True,
    "index": False,
    "model": False,
}
_LEGEND = (
    "running, waiting: requests.  tiers: how full, of how many chunks.  from cache: of all prompt tokens "
    "since it started, those it did not compute; from device: of all, those that vLLM still had itself.  "
    "index: exact about this worker lately, or stale and not believed"
)


def fetch_workers(
    url: str, token: SecretStr = NO_TOKEN, timeout_seconds: float = 5.0
) -> list[dict[str, Any]]:
    """GET /admin/workers of the gateway at `url`.  Raises LaunchError when it does not answer."""
    said = token.get_secret_value()
    try:
        reply = httpx.get(
            f"{url.rstrip('/')}/admin/workers",
            headers={"authorization": f"Bearer {said}"} if said else None,
            timeout=timeout_seconds,
            trust_env=False,
        )
        if reply.status_code == httpx.codes.UNAUTHORIZED:
            raise LaunchError(f"{url} asks for its admin token: set CAIRN_ADMIN_TOKEN")
        if reply.status_code == httpx.codes.FORBIDDEN:
            raise LaunchError(f"{url} must be named by its address, or given a CAIRN_ADMIN_TOKEN")
        if reply.status_code == httpx.codes.NOT_FOUND:
            raise LaunchError(
                f"{url} has no admin pages: set CAIRN_ADMIN_PORT, or name their port with --url"
            )
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


def hit_rate(worker: Worker, *tiers: str) -> float | None:
    """Share of prompt tokens since it started that came from these tiers, or from any: vLLM's own device
    cache is one.  None before the first prompt, and where it does not say."""
    asked = number(worker, "lookup_tokens")
    names = [f"hit_tokens_{tier}" for tier in tiers] or [n for n in worker if n.startswith("hit_tokens_")]
    found = [hits for name in names if (hits := number(worker, name)) is not None]
    return min(1.0, sum(found) / asked) if asked and found else None


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
            "device_hit_rate": hit_rate(worker, "device"),
            "trust": trust_of(worker),
        }
        for worker in workers
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    out = Table(box=None, header_style="bold", pad_edge=False, caption=_LEGEND, caption_justify="left")
    for heading, numeric in _COLUMNS.items():
        long = heading in ("worker", "model")  # where the terminal is narrow these give way
        out.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=not long,
            overflow="fold",
            min_width=len("worker") if long else None,
        )
    for row in rows:
        colour = {"ready": "green", **dict.fromkeys(("stale", "draining", "drained"), "yellow")}.get(
            row["state"], "red"
        )
        out.add_row(
            str(row["id"]),
            f"[{colour}]{row['state']}[/]",
            _count(row["running"]),
            _count(row["waiting"]),
            row["host"],
            row["disk"],
            _percent(row["hit_rate"]),
            _percent(row["device_hit_rate"]),
            str(row["trust"]),
            str(row["model"]),
        )
    return out


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
