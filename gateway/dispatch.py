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
from typing import Any

import httpx

from cacheengine.keys import ChunkKey, KeyScheme
from gateway.ask import Ask, read_ask, renamed
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
from gateway.proxy import Answer, Client, ClientGone, Headers, Patience, ask_worker, relay
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from router.placement import NoWorker as NobodyReady
from router.placement import Placement
from router.router import Router

log = logging.getLogger(__name__)

CLIENT_CLOSED = 499  # the status a metric gets when the client left before the first byte
_INLINE_BYTES = 8192  # a shorter body is tokenized on the loop: handing it to a thread costs more
SESSION = b"x-session-id"
_AFFINITY_BYTES = 1024  # of a body without keys: the start of a conversation
_BYTES_PER_TOKEN = 4  # a guess, for the load board, where the prompt was not tokenized


@dataclass(frozen=True, slots=True)
class Prompt:
    """What routing needs to know of a request."""

    model: str
    keys: Sequence[ChunkKey]
    tokens: int
    affinity: bytes
    unkeyed: str = ""  # why there are no keys
    session: bytes = b""  # the caller's own name for the conversation
    alone: bool = True  # the body has this one prompt: what the worker says of its cache is about it


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
        self._aliases = config.alias_map()
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
        ask, exchange.model, exchange.body = self._read(exchange.body)
        started = time.perf_counter()
        prompt = await self._prompt(exchange.model, ask, exchange.body, exchange.chat)
        if prompt.unkeyed:
            self._metrics.unkeyed.labels(prompt.unkeyed).inc()
        else:
            self._metrics.tokenize_seconds.observe(time.perf_counter() - started)
        session = exchange.client.header(SESSION) or prompt.session
        try:
            placements = await self._router.place(
                prompt.model, prompt.keys, prompt.tokens, affinity=prompt.affinity, session=session
            )
        except NobodyReady as exc:
            raise NoWorker(prompt.model) from exc
        await self._try_each(exchange, prompt, placements)

    def _read(self, body: bytes) -> tuple[Ask, str, bytes]:
        """What was asked, the served name, and the body for the worker: as it came, unless an alias was used.
        Raises GatewayError."""
        ask = read_ask(body)
        model = self._model(ask)
        return ask, model, renamed(body, model) if ask.model in self._aliases else body

    def _model(self, ask: Ask) -> str:
        """The served name asked for.  Raises UnknownModel, NoWorker, BadRequest."""
        registry = self._router.registry
        name = self._aliases.get(ask.model or "", ask.model)
        if name is not None and registry.workers_for(name):
            return name
        known = [*registry.describe()]
        bases = {str(worker["model"]) for worker in known}
        if name is None and len(bases) == 1:
            return bases.pop()
        if name is None and bases:
            raise BadRequest("You must provide a model parameter.", "model")
        served = bases.union(*(worker["adapters"] for worker in known))
        if not known or name in served or ask.model in self._aliases:
            raise NoWorker(ask.model or "")
        raise UnknownModel(ask.model or "")

    async def explain(self, body: bytes, session: bytes = b"") -> dict[str, Any]:
        """Where a request with this body, and this x-session-id, would go now, and why.  A dry run.  Raises
        GatewayError."""
        ask, model, body = self._read(body)
        prompt = await self._prompt(model, ask, body, chat=ask.messages is not None)
        try:
            decision = await self._router.explain(
                model, prompt.keys, prompt.tokens, prompt.affinity, session or prompt.session
            )
        except NobodyReady as exc:
            raise NoWorker(model) from exc
        return {**decision, "unkeyed": prompt.unkeyed}

    async def _prompt(self, model: str, ask: Ask, body: bytes, chat: bool) -> Prompt:
        """Chunk keys where we can make them; else the body's first bytes keep a conversation together."""
        keys: Sequence[ChunkKey] = ()
        total, unkeyed, alone = len(body) // _BYTES_PER_TOKEN, "", True
        registry = self._router.registry
        try:
            scheme = registry.scheme(model)
            if scheme is None:
                raise Unkeyable("no_scheme")
            workers = (w for w in registry.workers_for(model) if w.scheme == scheme)
            tokenizer = next(filter(None, map(self._handshake.tokenizer, workers)), None)
            if tokenizer is None:
                raise Unkeyable("no_tokenizer")
            tags = (*ask.tags, ("lora", model)) if registry.adapter(model) else ask.tags
            work = partial(_keys, tokenizer, scheme, ask, chat, tags)
            if len(body) <= _INLINE_BYTES:
                keys, total, alone = work()
            else:
                keys, total, alone = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except Unkeyable as exc:
            unkeyed = exc.reason
        return Prompt(model, keys, total, body[:_AFFINITY_BYTES], unkeyed, ask.session, alone)

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
        self._metrics.predicted_hit.labels(worker.id).inc(placement.expected_hit_tokens)
        try:
            async with ask_worker(
                self._transport, worker.url, exchange.path, client.headers, exchange.body, self._patience
            ) as answer:
                ticket.first_byte()
                self._metrics.ttft.labels(exchange.model).observe(time.perf_counter() - exchange.arrived)
                await relay(answer, client, _explanation(client, placement))
            self._learn(answer, placement, prompt)
        finally:
            ticket.done()

    def _learn(self, answer: Answer, placement: Placement, prompt: Prompt) -> None:
        if answer.status == 200 and (cached := answer.cached_tokens) is not None:
            self._metrics.learned(placement.worker.id, placement.expected_hit_tokens, cached)
            if prompt.alone:
                self._router.learn(placement, prompt.tokens, cached)


def _keys(
    tokenizer: ModelTokenizer, scheme: KeyScheme, ask: Ask, chat: bool, tags: Sequence[tuple[str, str]]
) -> tuple[Sequence[ChunkKey], int, bool]:
    """Chunk keys of the (longest) prompt, the tokens of all, whether it is alone.  Raises Unkeyable."""
    tokens = tokenizer.tokens(ask, chat)
    return scheme.keys(tokens.ids, tags), tokens.total, tokens.total == len(tokens.ids)


def _explanation(client: Client, placement: Placement) -> Headers:
    """Response headers for whoever asked why, with `x-cairn-explain: 1`."""
    if client.header(b"x-cairn-explain") != b"1":
        return []
    return [
        (b"x-cairn-worker", placement.worker.id.encode("latin-1", "replace")),
        (b"x-cairn-reason", placement.reason.encode()),
        (b"x-cairn-expected-hit-tokens", b"%d" % placement.expected_hit_tokens),
        (b"x-cairn-policy", placement.policy.encode()),
        (b"x-cairn-terms", ", ".join(f"{k}={ms:g}ms" for k, ms in placement.terms_ms.items()).encode()),
    ]
