"""/dashboard and what it polls: /admin/state, the whole picture in one small answer.

Everything comes out of memory that is there anyway: the pulse, the decision log, the registry.  No Redis is
asked, and what an answer costs does not grow with the traffic.  The page itself is three files without a
secret; what it shows is asked for with the admin pages' token.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import FileResponse, Response
from pydantic import SecretStr

from gateway.admin import worker_rows
from gateway.admin_door import guard
from gateway.dispatch import Dispatcher
from gateway.flow import Turns
from gateway.health import Health
from gateway.pulse import Pulse
from router.policy import TIERS, replayed
from router.router import Router

FILES = Path(__file__).parent / "dashboard"
MAX_WORKERS = 256  # rows of a page
MAX_DECISIONS = 40
MAX_PREFIXES = 12
MAX_HOLDERS = 16
MAX_ADAPTERS = 16

_KINDS = {
    **dict.fromkeys(("app.js", "charts.js", "dom.js", "views.js"), "text/javascript"),
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # no script, style, font or picture from anywhere else, no inline ones, nobody frames it
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_BRIEF = (
    "turn", "at", "model", "prompt_tokens", "worker", "answered_by", "reason", "expected_hit_tokens",
    "actual_hit_tokens", "predicted_ms", "ttft_ms",
)  # fmt: skip


class View:
    """What the page shows, in plain types.  REQUIRES: used from the gateway's event loop."""

    def __init__(
        self,
        router: Router,
        health: Health,
        dispatcher: Dispatcher,
        turns: Turns,
        pulse: Pulse,
        api: Mapping[str, Any] | None = None,
    ) -> None:
        """`api`: host and port of the API, where they are not the page's own."""
        self._router, self._health, self._pulse, self._api = router, health, pulse, api
        self._dispatcher, self._turns = dispatcher, turns
        self._life = uuid4().hex[:12]  # of this process: its numbers start anew with it

    def state(self, since: int, life: str) -> dict[str, Any]:
        """Now, and the time series' steps from number `since` of this `life` on; all of them for another."""
        rows = worker_rows(self._router, self._health)
        return {
            "life": self._life,
            "process": os.getpid(),
            "policy": self._router.policy,
            "api": self._api,
            "headline": {
                **self._pulse.headline(),
                "inflight": self._dispatcher.inflight,
                "queued": self._turns.depth,
            },
            "workers": [_worker(row) for row in rows[:MAX_WORKERS]],
            "workers_left_out": max(0, len(rows) - MAX_WORKERS),
            "removed": self._router.registry.removed()[:MAX_WORKERS],
            "series": self._pulse.series(since if life == self._life else 0),
            "decisions": [
                {name: decision[name] for name in _BRIEF}
                for decision in islice(reversed(self._router.decisions), MAX_DECISIONS)
            ],
            "heat": heat(self._router.decisions),
            "errors": self._pulse.errors(),
        }

    def receipt(self, turn: int) -> dict[str, Any] | None:
        """Why a request went where it went: every worker in front of it, in its order."""
        decision = self._router.decision(turn)
        if decision is None:
            return None
        workers = [
            {
                "worker": choice.candidate.worker,
                "terms_ms": choice.terms_ms,
                "total_ms": round(1000 * choice.seconds, 3),
                "hit_by_tier": choice.hit._asdict(),
                "inflight": choice.candidate.inflight,
                "queued_tokens": choice.candidate.queued_tokens,
                "held_back": choice.candidate.held_back,
            }
            for choice in replayed(decision)
        ]
        return {
            **{name: decision[name] for name in decision if name != "candidates"},
            "workers": workers,
        }


def heat(decisions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The prefixes most of these requests have in common, and who held how much of each when it was last
    asked for."""
    counts: Counter[str] = Counter()
    latest: dict[str, Mapping[str, Any]] = {}
    total = 0
    for decision in decisions:
        total += 1
        for name in decision["prefixes"]:  # at most two
            counts[name] += 1
            latest[name] = decision
    hot = [(name, count) for name, count in counts.most_common(MAX_PREFIXES) if count > 1]
    return {"decisions": total, "prefixes": [_prefix(name, count, latest[name]) for name, count in hot]}


def dashboard(view: View, token: SecretStr) -> APIRouter:
    """The page, its files, and what it asks for."""
    api = APIRouter(tags=["admin"])
    guarded = [Depends(guard(token))]

    @api.get("/dashboard", include_in_schema=False, dependencies=[] if token.get_secret_value() else guarded)
    async def page() -> Response:
        return FileResponse(FILES / "index.html", headers=_HEADERS, media_type="text/html")

    @api.get("/dashboard/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _KINDS:
            raise HTTPException(404, "Not Found")
        return FileResponse(FILES / name, headers=_HEADERS, media_type=_KINDS[name])

    @api.get("/admin/state", dependencies=guarded)
    async def state(since: int = 0, life: str = "") -> Response:
        """What /dashboard shows; polled every two seconds."""
        # encoded here: FastAPI would walk through all of it twice more
        return Response(msgspec.json.encode(view.state(since, life)), media_type="application/json")

    @api.get("/admin/decisions/{turn}", dependencies=guarded)
    async def receipt(turn: int) -> dict[str, Any]:
        """One placement with what every worker would have cost."""
        found = view.receipt(turn)
        if found is None:
            raise HTTPException(404, "that decision is no longer in the log")
        return found

    return api


def _prefix(name: str, count: int, decision: Mapping[str, Any]) -> dict[str, Any]:
    common = name != next(reversed(decision["prefixes"]))  # else where this prompt's own part begins
    tokens = decision["prefixes"][name] if common else decision["prompt_tokens"]
    holders = []
    for candidate in decision["candidates"]:
        left, held = tokens, {}
        for tier, hit in zip(TIERS, candidate["hit"], strict=True):
            held[tier] = min(left, hit)
            left -= held[tier]
        if left < tokens:
            holders.append({"worker": candidate["worker"], "tokens": held})
    holders.sort(key=lambda holder: -sum(holder["tokens"].values()))
    return {
        "key": name,
        "common": common,
        "model": decision["model"],
        "requests": count,
        "tokens": tokens,
        "holders": holders[:MAX_HOLDERS],
        "holders_left_out": max(0, len(holders) - MAX_HOLDERS),
    }


def _worker(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table.  A heartbeat is text somebody wrote: what is no number is left out."""
    beat, load = row["beat"], row["load"]
    tiers = []
    for tier in row["tiers"]:
        name = "shared" if tier == "redis" else tier
        used, slots = _number(beat, f"{name}_used"), _number(beat, f"{name}_slots")
        up = beat.get("redis_up") != "0" if name == "shared" else True
        tiers.append({"name": name, "used": used, "slots": slots, "up": up})
    return {
        **{
            name: row[name]
            for name in ("id", "model", "state", "stale", "share", "trusted", "trust", "health", "inflight")
        },
        "leased": row["leased"],
        "adapters": row["adapters"][:MAX_ADAPTERS],
        "adapters_left_out": max(0, len(row["adapters"]) - MAX_ADAPTERS),
        "tiers": tiers,
        "running": load["running"] if load["beat_ms"] else None,
        "waiting": load["waiting"] if load["beat_ms"] else None,
        "prefilling_tokens": row["prefilling_tokens"],
        "prefill_rate": load["prefill_rate"],
    }


def _number(beat: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(beat[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
