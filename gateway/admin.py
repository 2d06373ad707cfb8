"""The operators' pages: who takes traffic, orders about it, and why requests go where they go."""

from itertools import islice
from typing import Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import Response
from pydantic import SecretStr
from starlette.requests import ClientDisconnect

from cacheengine.errors import IndexDown
from gateway.admin_door import guard
from gateway.dispatch import SESSION, Dispatcher
from gateway.errors import BodyTooLarge, GatewayError
from gateway.exchange import CLIENT_CLOSED
from gateway.health import Health
from gateway.siblings import Siblings
from gateway.tenants import Door
from router.registry import UnknownWorker
from router.router import DECISIONS, Router


def admin(
    router: Router,
    dispatcher: Dispatcher,
    health: Health,
    door: Door,
    max_body_bytes: int,
    token: SecretStr,
    siblings: Siblings,
) -> APIRouter:
    """/admin/*; `cairn status` reads /admin/workers."""
    api = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(guard(token))])
    _tenants(api, door)
    _explained(api, dispatcher, max_body_bytes)

    @api.get("/workers")
    async def workers() -> dict[str, Any]:
        """Every known worker, ready or not, with this gateway's open requests on it."""
        rows = worker_rows(router, health)
        return {
            "workers": rows,
            "removed": router.registry.removed(),
            "inflight": dispatcher.inflight + sum(await siblings.ask("inflight")),
            "policy": router.policy,
        }

    @api.post("/workers/{worker_id:path}/drain")
    async def drain(worker_id: str) -> dict[str, str]:
        """No new traffic until it is resumed, also after a restart; what is under way finishes."""
        return await _order(router, siblings, worker_id, "drain")

    @api.post("/workers/{worker_id:path}/resume")
    async def resume(worker_id: str) -> dict[str, str]:
        """Takes back drain or removal."""
        return await _order(router, siblings, worker_id, "resume")

    @api.delete("/workers/{worker_id:path}")
    async def remove(worker_id: str) -> dict[str, str]:
        """Forgotten until it restarts (one with a lease) or is resumed; what is under way finishes."""
        return await _order(router, siblings, worker_id, "remove")

    @api.get("/decisions")
    async def decisions(limit: int = 100) -> dict[str, Any]:
        """The newest placements first, each with all it takes to replay it."""
        newest = islice(reversed(router.decisions), max(0, min(limit, DECISIONS)))
        return {"decisions": [dict(decision) for decision in newest]}

    return api


def worker_rows(router: Router, health: Health) -> list[dict[str, Any]]:
    """Every known worker, with this gateway's open requests on it and how far the index is believed."""
    return [_row(router, health, row) for row in router.registry.describe()]


def _tenants(api: APIRouter, door: Door) -> None:
    @api.get("/tenants")
    async def tenants() -> dict[str, Any]:
        """What each tenant has used of this process since its start, and of the month everywhere."""
        return {"shared": door.shared, "tenants": door.usage()}


def _explained(api: APIRouter, dispatcher: Dispatcher, max_body_bytes: int) -> None:
    @api.post("/route/explain")
    async def explain(request: Request) -> Any:
        """Where this body, as for chat/completions or completions, would go now, and why.  A dry run."""
        try:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > max_body_bytes:
                    raise BodyTooLarge(max_body_bytes)
            return await dispatcher.explain(body, request.headers.get(SESSION.decode(), "").encode("latin-1"))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)  # nobody hears it
        except GatewayError as exc:
            headers = {name.decode(): value.decode() for name, value in exc.headers()}
            return Response(exc.body(), exc.status, headers)


def _row(router: Router, health: Health, row: dict[str, Any]) -> dict[str, Any]:
    inflight = router.board.inflight(row["id"])
    busy = inflight or row["load"]["running"] or row["load"]["waiting"]
    worker = router.registry.find(row["id"])
    return {
        **row,
        "state": "draining" if row["state"] == "drained" and busy else row["state"],
        "trust": router.trust.describe(worker) if worker else {},
        "health": health.state(row["id"]),
        "inflight": inflight,
        "prefilling_tokens": router.board.prefilling(row["id"]),
    }


async def _order(
    router: Router, siblings: Siblings, worker_id: str, what: Literal["drain", "resume", "remove"]
) -> dict[str, str]:
    try:
        await router.registry.order(worker_id, what)
    except UnknownWorker:
        raise HTTPException(404, f"no worker is called {worker_id!r}") from None
    except IndexDown:
        raise HTTPException(503, "Redis does not answer, so the other gateways cannot be told") from None
    await siblings.ask("order", worker_id, what)  # without Redis they would not hear of it
    return {"worker": worker_id, "order": what}
