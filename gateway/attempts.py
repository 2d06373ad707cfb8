"""Placements, best first, until one of their workers speaks: attempts, retries, what is learned of each."""

import logging
import time
from collections.abc import Iterator, Sequence

from gateway.config import GatewayConfig
from gateway.errors import GatewayError, NoWorker, TooSlow, Unreachable, Upstream
from gateway.exchange import Exchange, Prompt
from gateway.health import Health, RetryBudget, Trial
from gateway.metrics import Metrics
from gateway.proxy import Patience, ask_worker, relay
from gateway.trace import Attempt
from gateway.usage import Usage
from gateway.wire import Headers, Transport
from router.load import Ticket
from router.placement import Placement
from router.router import Router

log = logging.getLogger(__name__)


class Attempts:
    """REQUIRES: used from one event loop; everything passed in outlives it."""

    def __init__(
        self, config: GatewayConfig, router: Router, transport: Transport, health: Health, metrics: Metrics
    ) -> None:
        self._router, self._transport, self._metrics = router, transport, metrics
        self._health, self._budget = health, RetryBudget()
        self._max_retries = config.max_retries
        self._patience = Patience(
            config.connect_timeout_seconds, config.first_byte_timeout_seconds, config.idle_timeout_seconds
        )

    async def answer(self, exchange: Exchange, prompt: Prompt, placements: Sequence[Placement]) -> None:
        """Best first, until a worker's first byte has reached the client.  Raises GatewayError."""
        left = self._max_retries
        failure: GatewayError = NoWorker(prompt.model)
        self._budget.earn()
        try:
            for placement in self._usable(prompt.model, placements):
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
                    if exchange.client.answered:
                        self._metrics.broken.inc()
                        raise
                    if isinstance(exc, TooSlow):
                        raise  # slow, not dead: sending it twice would make two workers slow
                    if not isinstance(exc, Unreachable):
                        left -= 1
                        if left < 0 or not exchange.endpoint.retriable:
                            raise
                        if not self._budget.take():
                            self._metrics.retries_denied.inc()
                            raise
            if isinstance(failure, Unreachable):
                raise NoWorker(prompt.model) from failure
            raise failure
        finally:
            del failure  # it knows this frame, and all that the request holds: memory until a collection

    def _usable(self, model: str, placements: Sequence[Placement]) -> Iterator[Placement]:
        """Those whose worker is not out at the moment it is needed, and still takes traffic when others were
        tried first; the first, where all are out."""
        tried = False
        for placement in placements:
            workers, worker = self._router.registry.workers_for(model), placement.worker
            here = not tried or any((w.id, w.url) == (worker.id, worker.url) for w in workers)
            if here and worker.id not in self._health.out(workers):
                tried = True
                yield placement
        if not tried:
            yield from placements[:1]

    async def _attempt(self, exchange: Exchange, prompt: Prompt, placement: Placement) -> None:
        exchange.placement = placement
        before, exchange.attempts = exchange.attempts, exchange.attempts + 1
        ticket = self._router.board.start(placement.worker.id, prompt.tokens, placement.expected_hit_tokens)
        self._metrics.decisions.labels(placement.policy, placement.reason, placement.worker.id).inc()
        self._metrics.predicted_hit.labels(placement.worker.id).inc(placement.expected_hit_tokens)
        trial = self._health.trial(placement.worker)
        try:
            with exchange.trace.attempt(placement, exchange.path, exchange.model, before) as span:
                status = await self._ask(exchange, placement, ticket, trial, span)
            if status == 200:
                self._learn(exchange.usage, placement, prompt)
        except Upstream as exc:
            trial.failed(exc)
            raise
        finally:
            ticket.done()
            trial.done()

    async def _ask(
        self, exchange: Exchange, placement: Placement, ticket: Ticket, trial: Trial, span: Attempt
    ) -> int:
        """One worker's answer to the client; its status."""
        client = exchange.client
        async with ask_worker(
            self._transport,
            client.alarm,
            placement.worker.url,
            exchange.path,
            span.headers(client.headers),
            exchange.upload or exchange.body,
            self._patience,
            span.connected,
            exchange.endpoint.retriable,
        ) as answer:
            ticket.first_byte()
            trial.first_byte(answer.status)
            span.first_byte(answer.status)
            exchange.ttft = time.perf_counter() - exchange.arrived
            exchange.answered = answer.status
            if answer.status == 200:
                self._router.spoke(placement, exchange.ttft)
            try:
                await relay(answer, client, _explanation(exchange, placement))
            finally:
                exchange.usage = answer.usage
            return answer.status

    def _learn(self, usage: Usage, placement: Placement, prompt: Prompt) -> None:
        if (cached := usage.cached) is not None:
            self._metrics.learned(placement.worker.id, placement.expected_hit_tokens, cached)
            if prompt.alone:
                self._router.learn(placement, prompt.tokens, cached)


def _explanation(exchange: Exchange, placement: Placement) -> Headers:
    """Response headers for whoever asked why, with `x-cairn-explain: 1`.  Who the workers are, and how busy,
    is not for tenants."""
    if exchange.client.header(b"x-cairn-explain") != b"1":
        return []
    told = [
        (b"x-cairn-reason", placement.reason.encode()),
        (b"x-cairn-expected-hit-tokens", b"%d" % placement.expected_hit_tokens),
        (b"x-cairn-policy", placement.policy.encode()),
        (b"x-cairn-worker", placement.worker.id.encode("latin-1", "replace")),
        (b"x-cairn-terms", ", ".join(f"{k}={ms:g}ms" for k, ms in placement.terms_ms.items()).encode()),
    ]
    return told if exchange.visit is None else told[:3]
