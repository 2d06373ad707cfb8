"""The only place where the gateway's objects are made and introduced to each other."""

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cacheengine.index_orders import Orders
from cacheengine.index_reader import Fleet, IndexReader
from gateway.admin import admin
from gateway.admin_door import listening
from gateway.attempts import Attempts
from gateway.config import GatewayConfig, is_loopback
from gateway.dashboard_view import View, dashboard
from gateway.dispatch import Dispatcher
from gateway.envelope import Envelope
from gateway.errors import ANTHROPIC, OPENAI, GatewayError, error_body
from gateway.exposition import Family, families
from gateway.flow import Turns
from gateway.handshake import Handshake
from gateway.health import Health
from gateway.keyring import FileKeys, Keyring, RedisKeys
from gateway.limits import Limits
from gateway.logs import request_line
from gateway.metrics import Metrics
from gateway.openapi import document
from gateway.prompts import Prompts
from gateway.pulse import Pulse
from gateway.routes import Shortcut, openai, operations, relayed, relayed_others
from gateway.siblings import NO_SIBLINGS, Answer, Siblings
from gateway.tenants import Door, Tenants
from gateway.tracing import NO_TRACER, Tracer
from gateway.watch import Watch
from gateway.wire import KEEPALIVE_SECONDS, Transport, Wire
from router.load import LoadBoard
from router.orders import Deed
from router.probe import Probe
from router.registry import Registry, UnknownWorker
from router.router import Router
from router.trust import Trust

log = logging.getLogger(__name__)

# For long prompts; short ones are tokenized where they arrive.  Whoever needs more threads needs `processes`.
_TOKENIZER_THREADS = 2


class Gateway(FastAPI):
    """REQUIRES: a server that takes it for ASGI 3 without looking: it has no `async def` (gateway/routes.py
    says why)."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        scope["app"] = self
        assert self.middleware_stack is not None  # _finished() made it
        return self.middleware_stack(scope, receive, send)


def create_app(
    config: GatewayConfig,
    *,
    transport: Transport | None = None,
    tracer: Tracer = NO_TRACER,
    board: LoadBoard | None = None,
    siblings: Siblings = NO_SIBLINGS,
) -> FastAPI:
    """Objects are made here and do no I/O; the lifespan opens and closes them.  `transport` carries requests
    to workers; `tracer` is closed with the rest; processes of one gateway share a `board` and know their
    `siblings`.  Raises OSError for a workers_ca that cannot be read."""
    metrics = Metrics(CollectorRegistry())
    pool = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="cairn-tokenize")
    carrier, http = _carriers(config, transport)
    fleet, orders, index = _redis(config)
    board, trust, health = board or LoadBoard(), Trust(), Health()
    registry = _registry(config, http, fleet, orders, board, trust, health, metrics)
    router = _router(config, registry, board, index, trust, health, metrics)
    handshake = Handshake(registry, http, pool, metrics, config.tokenizer_path)
    prompts = Prompts(registry, handshake, pool, config.alias_map())
    attempts = Attempts(config, router, carrier, health, metrics)
    watch = Watch(registry, board, health, Probe(http), config.wedge_seconds)
    turns, pulse, door = _turns(config, registry, metrics), Pulse(), _door(config, metrics)
    ended = [door.ended, metrics.ended, pulse.ended, tracer.ended, request_line]
    dispatcher = Dispatcher(config, router, prompts, turns, attempts, door, metrics, tracer, ended)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(tracer.close)
            opened.callback(pool.shutdown, wait=False, cancel_futures=True)
            opened.push_async_callback(carrier.aclose)
            await opened.enter_async_context(http)
            opened.push_async_callback(_closed, fleet, orders, door)
            if index is not None:
                opened.push_async_callback(index.close)
                await _open(index)
            await door.open()
            await opened.enter_async_context(siblings.answered(_answers(router, dispatcher, metrics)))
            await registry.refresh()
            for run in (registry.run, handshake.run, watch.run, metrics.watch_loop, *door.running()):
                opened.push_async_callback(_stopped, asyncio.create_task(run()))
            if pages is not app:
                app.state.beside = await opened.enter_async_context(listening(pages, config))
            yield

    app = Gateway(title="Cairn", lifespan=lifespan, redirect_slashes=False)
    pages = _pages(app, config)
    app.router.routes.extend(table := relayed(dispatcher))
    app.include_router(openai(router, door, config.alias_map(), started=int(time.time())))
    app.include_router(operations(router, health, metrics, siblings))
    told, token = (door, config.max_body_bytes, config.admin_token, siblings), config.admin_token
    pages.include_router(admin(router, dispatcher, health, *told))
    pages.include_router(dashboard(View(router, health, dispatcher, turns, pulse, config.api), token))
    if pages is not app:
        pages.include_router(operations(router, health, metrics, siblings))
    app.router.routes.append(relayed_others(dispatcher))
    document(app)
    return _finished(app, config, table)


def _redis(config: GatewayConfig) -> tuple[Fleet | None, Orders | None, IndexReader | None]:
    if not (url := config.redis_url):
        return None, None, None
    return Fleet(url), Orders(url), IndexReader(url, config.index_deadline_ms)


def _pages(app: FastAPI, config: GatewayConfig) -> FastAPI:
    """What operators see: part of the application, or one beside it with a port of its own."""
    if not config.admin_port:
        return app
    pages = FastAPI(title="Cairn, for operators")
    _errors(pages)
    return pages


def _errors(app: FastAPI) -> None:
    app.add_exception_handler(GatewayError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.add_exception_handler(Exception, _our_fault)


def _finished(app: FastAPI, config: GatewayConfig, table: Sequence[Route]) -> FastAPI:
    """Refuses politely; what is relayed goes past the framework."""
    _errors(app)
    direct = {route.path: route.endpoint for route in table}
    past = Shortcut(app.build_middleware_stack(), direct)
    app.middleware_stack = Envelope(past, config.cors_origins)
    return app


def _answers(router: Router, dispatcher: Dispatcher, metrics: Metrics) -> dict[str, Answer]:
    """To what the other processes ask."""

    async def inflight() -> int:
        return dispatcher.inflight

    async def decisions(limit: int) -> list[dict[str, Any]]:
        return [dict(decision) for decision in islice(reversed(router.decisions), limit)]

    async def told() -> list[Family]:
        return families(metrics.registry)

    async def order(worker_id: str, what: Deed) -> bool:
        with contextlib.suppress(UnknownWorker):
            await router.registry.order(worker_id, what)
        return True

    return {"inflight": inflight, "decisions": decisions, "metrics": told, "order": order}


async def _open(index: IndexReader) -> None:
    if not await index.open():
        log.warning("not all of the chunk index answers; until it does, prompts are placed by hash")


def _router(
    config: GatewayConfig,
    registry: Registry,
    board: LoadBoard,
    index: IndexReader | None,
    trust: Trust,
    health: Health,
    metrics: Metrics,
) -> Router:
    return Router(
        registry,
        board,
        index,
        config.policy,
        on_decision=metrics.decided,
        shadow=config.shadow_policy,
        trust=trust,
        out=health.out,
    )


def _carriers(config: GatewayConfig, transport: Transport | None) -> tuple[Transport, httpx.AsyncClient]:
    """What carries callers' requests to workers, and what is for health checks and handshakes.  The latter
    has no limit either: workers that do not answer must not keep the others from being asked."""
    tls = ssl.create_default_context(cafile=config.workers_ca or None)
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS
    )
    return transport or Wire(tls), httpx.AsyncClient(trust_env=False, limits=limits, verify=tls)


def _turns(config: GatewayConfig, registry: Registry, metrics: Metrics) -> Turns:
    turns = Turns(
        registry.workers_for,
        config.max_queue,
        config.queue_timeout_seconds,
        config.worker_seats,
        waited=metrics.queue_wait.observe,
        refused=lambda reason: metrics.refused.labels(reason).inc(),
    )
    metrics.queue.set_function(lambda: turns.depth)
    return turns


def _door(config: GatewayConfig, metrics: Metrics) -> Door:
    if config.auth == "off":
        if not is_loopback(config.host):
            log.warning("whoever reaches %s may send requests: set auth to keys", config.host)
        return Door()
    store = FileKeys(config.keys_file) if config.keys_file else RedisKeys(config.redis_url)
    return Tenants(Keyring(store), Limits(config.redis_url, config.index_deadline_ms / 1000), metrics)


def _registry(
    config: GatewayConfig,
    http: httpx.AsyncClient,
    fleet: Fleet | None,
    orders: Orders | None,
    board: LoadBoard,
    trust: Trust,
    health: Health,
    metrics: Metrics,
) -> Registry:
    def gone(worker_id: str) -> None:
        board.forget(worker_id)
        trust.forget(worker_id)
        health.forget(worker_id)
        metrics.left(worker_id)

    return Registry(
        http,
        fleet,
        config.static_workers(),
        on_leave=gone,
        sources=config.sources(),
        orders=orders,
        warmup_seconds=config.warmup_seconds,
    )


async def _closed(*parts: Fleet | Orders | Door | None) -> None:
    for part in parts:
        if part is not None:
            await part.close()


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    kind = "invalid_request_error" if exc.status_code < 500 else "server_error"
    refusal = GatewayError(f"{exc.detail}: {request.method} {request.url.path}")
    refusal.status, refusal.kind = exc.status_code, kind
    refusal.code = "not_found" if exc.status_code == 404 else None
    dialect = ANTHROPIC if request.url.path.startswith("/v1/messages") else OPENAI
    return Response(dialect.body(refusal), exc.status_code, exc.headers, "application/json")


async def _refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, GatewayError)
    headers = {name.decode(): value.decode() for name, value in exc.headers()}
    return Response(exc.body(), exc.status, headers)


async def _bad_parameter(request: Request, exc: Exception) -> Response:
    return Response(error_body(str(exc), "invalid_request_error", None), 400, media_type="application/json")


async def _our_fault(request: Request, exc: Exception) -> Response:
    body = error_body("The gateway failed to handle this request.", "server_error", "internal_error")
    return Response(body, 500, media_type="application/json")
