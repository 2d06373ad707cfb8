"""The HTTP surface.  What is relayed is plain ASGI: nothing between the worker's bytes and the socket.

Layers that only pass a request on are functions that return the next one's coroutine: each coroutine in
between costs as much, whenever a request wakes up, as reading a short chunk does.
"""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.dispatch import Dispatcher
from gateway.endpoints import ENDPOINTS, Endpoint, known, other
from gateway.errors import UnknownModel, error_body
from gateway.exposition import Family, exposition, families
from gateway.health import Health
from gateway.metrics import Metrics
from gateway.proxy import Client
from gateway.siblings import Siblings
from gateway.tenants import Door
from router.router import Router


class Relay:
    """ASGI endpoint of one line of the table."""

    def __init__(self, dispatcher: Dispatcher, endpoint: Endpoint) -> None:
        self._dispatcher, self._endpoint = dispatcher, endpoint

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        client = Client(scope, receive, send, self._endpoint.dialect)
        return self._dispatcher.serve(client, self._endpoint, self._endpoint.path)


class RelayOther:
    """ASGI endpoint of the paths below /v1 that nobody here knows, and of methods nobody expects."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = other(scope["path"]) if scope["method"] == "POST" else None
        if endpoint is None:
            raise HTTPException(405 if known(scope["path"]) else 404)
        await self._dispatcher.serve(Client(scope, receive, send), endpoint, scope["path"])


class Shortcut:
    """An application in which POSTs to some paths do not go through the framework's middleware and routing:
    their endpoints answer for every error themselves."""

    def __init__(self, rest: ASGIApp, direct: Mapping[str, ASGIApp]) -> None:
        self._rest, self._direct = rest, direct

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and scope["method"] == "POST":
            return self._direct.get(scope["path"], self._rest)(scope, receive, send)
        return self._rest(scope, receive, send)


def relayed(dispatcher: Dispatcher) -> list[Route]:
    """The paths of the table."""
    return [
        Route(path, Relay(dispatcher, endpoint), methods=["POST"], name=path, include_in_schema=False)
        for path, endpoint in ENDPOINTS.items()
    ]


def relayed_others(dispatcher: Dispatcher) -> Route:
    """Everything else below /v1.  REQUIRES: the last route."""
    return Route("/v1/{rest:path}", RelayOther(dispatcher), include_in_schema=False)


def openai(router: Router, door: Door, aliases: Mapping[str, str], started: int) -> APIRouter:
    """What is answered here of OpenAI's surface.  `started` (Unix seconds) is the models' creation date."""
    api = APIRouter(tags=["openai"])

    def cards() -> dict[str, dict[str, Any]]:
        ready = {name: router.registry.card(name) for name in router.registry.models()}
        known = {
            name: {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "cairn",
                "root": card.root or name,
                "parent": card.parent,
                "max_model_len": card.max_model_len,
            }
            for name, card in ready.items()
        }
        named = {alias: {**known[model], "id": alias} for alias, model in aliases.items() if model in known}
        return dict(sorted({**named, **known}.items()))

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """Every model, adapter and alias some worker serves now and the caller may use."""
        key = door.caller(request.headers.raw)
        used = [card for name, card in cards().items() if key.may_use(name, aliases.get(name))]
        return {"object": "list", "data": used}

    @api.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Any:
        """One of them."""
        key = door.caller(request.headers.raw)
        card = cards().get(model)
        if card is None or not key.may_use(model, aliases.get(model)):
            unknown = UnknownModel(model)
            return Response(unknown.body(), unknown.status, media_type="application/json")
        return card

    @api.get("/v1/responses/{response_id}")
    @api.delete("/v1/responses/{response_id}")
    @api.post("/v1/responses/{response_id}/cancel")
    async def response(response_id: str) -> Response:
        """Always 404: responses are not kept."""
        body = error_body("Responses are not kept here.", "invalid_request_error", "not_found", "response_id")
        return Response(body, 404, media_type="application/json")

    return api


def operations(router: Router, health: Health, metrics: Metrics, siblings: Siblings) -> APIRouter:
    """Health and metrics."""
    api = APIRouter(tags=["operations"])

    @api.get("/health")
    @api.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/health/ready")
    async def ready() -> Response:
        """200 when at least one worker takes traffic, else 503."""
        workers = len(router.registry.snapshot())
        status = {"status": "ready" if workers else "no worker", "workers": workers}
        return JSONResponse(status, 200 if workers else 503)

    @api.get("/metrics")
    async def tell() -> Response:
        """Of all processes of this gateway."""
        workers = router.registry.snapshot()
        metrics.fleet({worker.id: router.trust.describe(worker) for worker in workers})
        metrics.health({worker.id: health.state(worker.id) for worker in workers})
        others = await siblings.ask("metrics")
        text = await run_in_threadpool(_text, metrics.registry, others)  # off the requests' loop
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return api


def _text(registry: CollectorRegistry, others: Sequence[list[Family]]) -> bytes:
    return exposition([families(registry), *others]) if others else generate_latest(registry)
