"""The HTTP surface.  Generation is plain ASGI: nothing between the worker's bytes and the socket."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from gateway.dispatch import Dispatcher
from gateway.health import Health
from gateway.metrics import Metrics
from gateway.proxy import Client
from router.router import Router


class Generation:
    """ASGI endpoint of one OpenAI path that generates."""

    def __init__(self, dispatcher: Dispatcher, path: str, chat: bool) -> None:
        self._dispatcher, self._path, self._chat = dispatcher, path, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._dispatcher.serve(Client(scope, receive, send), self._path, self._chat)


def generation(dispatcher: Dispatcher) -> list[BaseRoute]:
    """POST /v1/chat/completions and /v1/completions."""
    paths = {"/v1/chat/completions": True, "/v1/completions": False}
    return [
        Route(path, Generation(dispatcher, path, chat), methods=["POST"], name=path)
        for path, chat in paths.items()
    ]


def openai(router: Router, aliases: Mapping[str, str], started: int) -> APIRouter:
    """The rest of OpenAI's surface.  `started` (Unix seconds) is the models' creation date."""
    api = APIRouter(tags=["openai"])

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every model, adapter and alias some worker serves now."""
        ready = router.registry.models()
        names = {*ready, *(alias for alias, model in aliases.items() if model in ready)}
        served = [
            {"id": name, "object": "model", "created": started, "owned_by": "cairn"} for name in sorted(names)
        ]
        return {"object": "list", "data": served}

    return api


def operations(router: Router, health: Health, metrics: Metrics) -> APIRouter:
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
    def exposition() -> Response:  # not async: FastAPI runs it on a thread, off the requests' loop
        workers = router.registry.snapshot()
        metrics.fleet({worker.id: router.trust.describe(worker) for worker in workers})
        metrics.health({worker.id: health.state(worker.id) for worker in workers})
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return api
