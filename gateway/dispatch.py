"""One request from its bytes to its answer: read, tokenize, key, wait its turn, place, try workers until
one speaks.

Everything a request holds is released here: its place in the in-flight count and its ticket on the load board
and its turn in a `finally`, the worker's connection by leaving `ask_worker`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from gateway.attempts import Attempts
from gateway.config import GatewayConfig
from gateway.endpoints import Endpoint
from gateway.envelope import REQUEST_ID
from gateway.errors import GatewayError, NoWorker, Overloaded
from gateway.exchange import Exchange, Prompt
from gateway.flow import Turns
from gateway.metrics import Metrics
from gateway.prompts import Prompts
from gateway.proxy import Client, ClientGone
from gateway.tenants import Door
from gateway.tracing import Tracer
from gateway.upload import Upload
from router.placement import NoWorker as NobodyReady
from router.placement import Placement
from router.router import Router

log = logging.getLogger(__name__)

SESSION = b"x-session-id"


class Dispatcher:
    """REQUIRES: used from one event loop; everything passed in outlives it."""

    def __init__(
        self,
        config: GatewayConfig,
        router: Router,
        prompts: Prompts,
        turns: Turns,
        attempts: Attempts,
        door: Door,
        metrics: Metrics,
        tracer: Tracer,
        ended: Sequence[Callable[[Exchange], None]] = (),
    ) -> None:
        """Each of `ended` hears of every request once, when it is over; none may raise or wait."""
        self._config, self._router, self._metrics = config, router, metrics
        self._prompts, self._turns, self._attempts = prompts, turns, attempts
        self._door, self._tracer, self._ended = door, tracer, ended
        self.inflight = 0
        metrics.inflight.set_function(lambda: self.inflight)

    async def serve(self, client: Client, endpoint: Endpoint, path: str) -> None:
        """Answer one request, whatever happens."""
        exchange = Exchange(client, endpoint, path, time.perf_counter())
        exchange.request_id = (client.header(REQUEST_ID) or b"").decode()
        exchange.trace = self._tracer.begin(client, path, exchange.arrived)
        self.inflight += 1
        try:
            self._door.enter(exchange)
            if self.inflight > self._config.max_inflight:
                raise Overloaded(self.inflight - 1)
            await self._read(exchange)
            with client.here(self._config.total_timeout_seconds):
                await self._answer(exchange)
        except ClientGone:
            exchange.aborted = True
        except GatewayError as exc:
            exchange.failure = exc.code or exc.kind
            await client.refuse(exc)
        except Exception:  # the top of an ASGI handler
            log.exception("%s failed", path)
            exchange.failure = "internal_error"
            await client.refuse(GatewayError("The gateway failed to handle this request."))
        finally:
            await client.hush()
            self.inflight -= 1
            exchange.total = time.perf_counter() - exchange.arrived
            for hear in self._ended:
                hear(exchange)

    async def _read(self, exchange: Exchange) -> None:
        """The body, or of an upload what tells its model.  Raises GatewayError, ClientGone."""
        client, most = exchange.client, self._config.max_body_bytes
        if exchange.endpoint.body == "json":
            exchange.body = await client.body(most)
            return
        length = (client.header(b"content-length") or b"").decode("ascii", "replace")
        exchange.upload = client.upload = Upload(
            client.header(b"content-type") or b"",
            int(length) if length.isdecimal() else None,
            client.part,
        )
        await exchange.upload.look(most)

    async def _answer(self, exchange: Exchange) -> None:
        """Raises GatewayError."""
        trace, started = exchange.trace, time.perf_counter()
        ask, exchange.model, exchange.body = self._prompts.read(exchange)
        ask = self._door.isolated(exchange, ask)
        if ask.stream is True and exchange.endpoint.streams and self._config.keepalive_seconds:
            exchange.client.keep_alive(self._config.keepalive_seconds)
        started = trace.step("parse", started)
        prompt = await self._prompts.prompt(exchange.model, ask, exchange.body, exchange.endpoint)
        exchange.prompt = prompt
        tokenized = trace.step("tokenize", started)
        if prompt.unkeyed:
            self._metrics.unkeyed.labels(prompt.unkeyed).inc()
        else:
            self._metrics.tokenize_seconds.observe(tokenized - started)
        await self._door.take(exchange, ask, prompt)
        turn = await self._turns.take(prompt.model, exchange.caller, prompt.tokens)
        exchange.queued = turn.waited
        started = trace.step("queue", tokenized)
        try:
            placements = await self._placed(exchange, prompt)
            if self._router.decisions:  # nothing ran since: the last one is ours
                trace.placed(started, self._router.decisions[-1])
            await self._attempts.answer(exchange, prompt, placements)
        finally:
            turn.done(exchange.usage.completion or 0)

    async def _placed(self, exchange: Exchange, prompt: Prompt) -> Sequence[Placement]:
        session = exchange.client.header(SESSION) or prompt.session
        try:
            return await self._router.place(
                prompt.model, prompt.keys, prompt.tokens, affinity=prompt.affinity, session=session
            )
        except NobodyReady as exc:
            raise NoWorker(prompt.model) from exc

    async def explain(self, body: bytes, session: bytes = b"") -> dict[str, Any]:
        """Where a request with this body, and this x-session-id, would go now, and why.  A dry run.  Raises
        GatewayError."""
        endpoint = self._prompts.guess(body)
        ask, model, body = self._prompts.read_body(body, endpoint)
        prompt = await self._prompts.prompt(model, ask, body, endpoint)
        try:
            decision = await self._router.explain(
                model, prompt.keys, prompt.tokens, prompt.affinity, session or prompt.session
            )
        except NobodyReady as exc:
            raise NoWorker(model) from exc
        return {**decision, "unkeyed": prompt.unkeyed}
