"""One request from its bytes to its answer: read, tokenize, key, place, try workers until one speaks.

Everything a request holds is released here: its place in the in-flight count and its ticket on the load board
in a `finally`, the worker's connection by leaving `ask_worker`.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import httpx

from cacheengine.keys import ChunkKey, KeyScheme
from gateway.ask import Ask, read_ask
from gateway.config import GatewayConfig
from gateway.errors import (
    BadRequest,
    GatewayError,
    NoWorker,
    Overloaded,
    TooSlow,
    UnknownModel,
    Unreachable,
    Upstream,
)
from gateway.handshake import Handshake
from gateway.metrics import Metrics
from gateway.proxy import Client, ClientGone, Headers, Patience, ask_worker, relay
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from router.placement import NoWorker as NobodyReady
from router.placement import Placement
from router.router import Router

log = logging.getLogger(__name__)

CLIENT_CLOSED = 499  # the status a metric gets when the client left before the first byte
_INLINE_BYTES = 8192  # a shorter body is tokenized on the loop: handing it to a thread costs more
_AFFINITY_BYTES = 1024  # of a body without keys: the start of a conversation
_BYTES_PER_TOKEN = 4  # a guess, for the load board, where the prompt was not tokenized


@dataclass(frozen=True, slots=True)
class Prompt:
    """What routing needs to know of a request."""

    model: str
    keys: Sequence[ChunkKey]
    tokens: int
    affinity: bytes


@dataclass(slots=True)
class Exchange:
    """One request under way, and what is known of it so far."""

    client: Client
    path: str
    chat: bool
    arrived: float
    body: bytes = b""
    model: str = "unknown"  # a metric's label: only ever the name of a model that is served


class Dispatcher:
    """REQUIRES: used from one event loop; everything passed in outlives it."""

    def __init__(
        self,
        config: GatewayConfig,
        router: Router,
        handshake: Handshake,
        transport: httpx.AsyncBaseTransport,
        pool: Executor,
        metrics: Metrics,
    ) -> None:
        self._config, self._router, self._handshake = config, router, handshake
        self._transport, self._pool, self._metrics = transport, pool, metrics
        self._patience = Patience(
            config.connect_timeout_seconds, config.first_byte_timeout_seconds, config.idle_timeout_seconds
        )
        self.inflight = 0
        metrics.inflight.set_function(lambda: self.inflight)

    async def serve(self, client: Client, path: str, chat: bool) -> None:
        """Answer one generation request, whatever happens."""
        exchange = Exchange(client, path, chat, time.perf_counter())
        self.inflight += 1
        try:
            if self.inflight > self._config.max_inflight:
                raise Overloaded(self.inflight - 1)
            exchange.body = await client.body(self._config.max_body_bytes)
            if not await client.stays_for(self._answer(exchange)):
                raise ClientGone
        except ClientGone:
            self._metrics.aborts.inc()
        except GatewayError as exc:
            await client.refuse(exc)
        except Exception:  # the top of an ASGI handler
            log.exception("%s failed", path)
            await client.refuse(GatewayError("The gateway failed to handle this request."))
        finally:
            self.inflight -= 1
            status = str(client.status or CLIENT_CLOSED)
            self._metrics.requests.labels(exchange.model, path, status).inc()

    async def _answer(self, exchange: Exchange) -> None:
        """Raises GatewayError."""
        ask = read_ask(exchange.body)
        exchange.model = self._model(ask)
        prompt = await self._prompt(exchange, ask)
        try:
            placements = await self._router.place(
                prompt.model, prompt.keys, prompt.tokens, affinity=prompt.affinity
            )
        except NobodyReady as exc:
            raise NoWorker(prompt.model) from exc
        await self._try_each(exchange, prompt, placements)

    def _model(self, ask: Ask) -> str:
        """The served name asked for.  Raises UnknownModel, NoWorker, BadRequest."""
        ready = self._router.registry.models()
        if ask.model in ready:
            return ask.model
        known = {*ready, *(str(worker["model"]) for worker in self._router.registry.describe())}
        if ask.model is None and len(known) == 1:
            return known.pop()
        if ask.model is None and known:
            raise BadRequest("You must provide a model parameter.", "model")
        if not known or ask.model in known:
            raise NoWorker(ask.model or "")
        raise UnknownModel(ask.model or "")

    async def _prompt(self, exchange: Exchange, ask: Ask) -> Prompt:
        """Chunk keys where we can make them; else the body's first bytes keep a conversation together."""
        started = time.perf_counter()
        model, body = exchange.model, exchange.body
        keys: Sequence[ChunkKey] = ()
        total = len(body) // _BYTES_PER_TOKEN
        try:
            scheme = self._router.registry.scheme(model)
            if scheme is None:
                raise Unkeyable("no_scheme")
            workers = (w for w in self._router.registry.workers_for(model) if w.scheme == scheme)
            tokenizer = next(filter(None, map(self._handshake.tokenizer, workers)), None)
            if tokenizer is None:
                raise Unkeyable("no_tokenizer")
            work = partial(_keys, tokenizer, scheme, ask, exchange.chat)
            if len(body) <= _INLINE_BYTES:
                keys, total = work()
            else:
                keys, total = await asyncio.get_running_loop().run_in_executor(self._pool, work)
            self._metrics.tokenize_seconds.observe(time.perf_counter() - started)
        except Unkeyable as exc:
            self._metrics.unkeyed.labels(exc.reason).inc()
        return Prompt(model, keys, total, body[:_AFFINITY_BYTES])

    async def _try_each(self, exchange: Exchange, prompt: Prompt, placements: Sequence[Placement]) -> None:
        """Best first, until a worker's first byte has reached the client.  Raises GatewayError."""
        left = self._config.max_retries
        failure: GatewayError = NoWorker(prompt.model)
        for placement in placements:
            if isinstance(failure, Upstream):
                self._metrics.retries.labels(type(failure).__name__.lower()).inc()
            try:
                await self._attempt(exchange, prompt, placement)
                return
            except Upstream as exc:
                failure = exc
                log.warning("worker %s: %s (%r)", placement.worker.id, exc, exc.cause)
                if isinstance(exc, Unreachable):
                    self._router.registry.mark_down(placement.worker.id)
                if exchange.client.status:
                    self._metrics.broken.inc()
                    raise
                if isinstance(exc, TooSlow):
                    raise  # slow, not dead: sending it twice would make two workers slow
                if not isinstance(exc, Unreachable):
                    left -= 1
                    if left < 0:
                        raise
        if isinstance(failure, Unreachable):
            raise NoWorker(prompt.model) from failure
        raise failure

    async def _attempt(self, exchange: Exchange, prompt: Prompt, placement: Placement) -> None:
        client, worker = exchange.client, placement.worker
        ticket = self._router.board.start(worker.id, prompt.tokens, placement.expected_hit_tokens)
        self._metrics.decisions.labels(placement.policy, placement.reason, worker.id).inc()
        self._metrics.predicted_hit.inc(placement.expected_hit_tokens)
        try:
            async with ask_worker(
                self._transport, worker.url, exchange.path, client.headers, exchange.body, self._patience
            ) as answer:
                ticket.first_byte()
                self._metrics.ttft.labels(exchange.model).observe(time.perf_counter() - exchange.arrived)
                await relay(answer, client, _explanation(client, placement))
            if (cached := answer.cached_tokens) is not None:
                self._metrics.actual_hit.inc(cached)
        finally:
            ticket.done()


def _keys(
    tokenizer: ModelTokenizer, scheme: KeyScheme, ask: Ask, chat: bool
) -> tuple[Sequence[ChunkKey], int]:
    """Chunk keys of the (longest) prompt and the tokens of all.  Raises Unkeyable."""
    tokens = tokenizer.tokens(ask, chat)
    return scheme.keys(tokens.ids, ask.tags), tokens.total


def _explanation(client: Client, placement: Placement) -> Headers:
    """Response headers for whoever asked why, with `x-cairn-explain: 1`."""
    if client.header(b"x-cairn-explain") != b"1":
        return []
    return [
        (b"x-cairn-worker", placement.worker.id.encode("latin-1", "replace")),
        (b"x-cairn-reason", placement.reason.encode()),
        (b"x-cairn-expected-hit-tokens", b"%d" % placement.expected_hit_tokens),
    ]
