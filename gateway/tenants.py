"""Tenants in the way of a request: who it is, what it may ask for, its limits, and what it used in the end.

`Tenants` stands there where keys are asked for, and a plain `Door` otherwise, which does nothing.
"""

import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.types import Message, Send

from gateway.ask import Asked, spliced
from gateway.auth import credential, without_credentials
from gateway.errors import BadRequest, KeysUnknown, TooMany, Unauthorized
from gateway.exchange import Exchange, Prompt
from gateway.keepalive import COMMENT
from gateway.keyring import ANONYMOUS, Key, Keyring
from gateway.limits import Account, Limits, Visit, duration
from gateway.metrics import Metrics
from gateway.wire import Headers

_MAX_ANSWER_TOKENS = 1 << 20
_MAX_CHOICES = 128

A = TypeVar("A", bound=Asked)


class Door:
    """What the dispatcher asks about a caller.  This one asks for no keys, and nobody has a limit."""

    def caller(self, headers: Headers) -> Key:
        """Raises Unauthorized, KeysUnknown."""
        return ANONYMOUS

    def enter(self, exchange: Exchange) -> None:
        """The caller becomes known.  Raises Unauthorized, KeysUnknown, TooMany."""

    def isolated(self, exchange: Exchange, ask: A) -> A:
        """The same request, in its tenant's own part of the cache where its key says so; also in the body for
        the worker.  Raises BadRequest."""
        return ask

    async def take(self, exchange: Exchange, ask: Asked, prompt: Prompt) -> None:
        """Its share of the key's limits.  Raises TooMany."""

    def ended(self, exchange: Exchange) -> None:
        """It is over."""

    @property
    def shared(self) -> bool:
        """Whether limits are counted over all gateways now."""
        return False

    def usage(self) -> list[dict[str, Any]]:
        """Of each tenant, for operators."""
        return []

    async def open(self) -> None:
        """Start connecting."""

    async def close(self) -> None:
        """Idempotent."""

    def running(self) -> Iterable[Callable[[], Coroutine[Any, Any, None]]]:
        """What runs as long as the gateway does."""
        return ()


@dataclass(slots=True)
class _Used:
    """By one tenant, since this process started."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class Tenants(Door):
    """Asks for keys, and holds everybody to their limits.  REQUIRES: used from one event loop."""

    def __init__(self, keyring: Keyring, limits: Limits, metrics: Metrics) -> None:
        self._keyring, self._limits, self._metrics = keyring, limits, metrics
        self._used: dict[str, _Used] = {}

    def caller(self, headers: Headers) -> Key:
        said = credential(headers)
        if said and (found := self._keyring.find(said)):
            return found
        if said and not self._keyring.known:
            raise KeysUnknown
        self._metrics.tenant_refused.labels("", "key").inc()
        raise Unauthorized(bool(said))

    def enter(self, exchange: Exchange) -> None:
        client = exchange.client
        exchange.caller = key = self.caller(client.headers)
        exchange.visit = visit = Visit(self._limits.account(key))
        client.headers = without_credentials(client.headers)
        client.through(lambda send: self._counted(send, visit))
        self._limits.enter(visit)

    def isolated(self, exchange: Exchange, ask: A) -> A:
        if not exchange.caller.isolate or exchange.upload is not None:
            return ask
        if not isinstance(ask.cache_salt, str | None):
            raise BadRequest("cache_salt must be a string.", "cache_salt")
        salt = self._keyring.salt(exchange.caller.tenant, ask.cache_salt or "")
        exchange.body = spliced(exchange.body, cache_salt=salt)
        return msgspec.structs.replace(ask, cache_salt=salt)

    async def take(self, exchange: Exchange, ask: Asked, prompt: Prompt) -> None:
        if (visit := exchange.visit) is None:
            return
        try:
            visit.grant = await self._limits.take(
                exchange.caller, prompt.tokens, answer_tokens(ask) if exchange.endpoint.generates else 0
            )
        except TooMany as exc:
            visit.refused = exc.short
            raise

    def ended(self, exchange: Exchange) -> None:
        if (visit := exchange.visit) is None:
            return
        self._limits.exit(visit)
        tenant, metrics = exchange.caller.tenant, self._metrics
        used = self._used.setdefault(tenant, _Used())
        used.requests += 1
        metrics.tenant_requests.labels(tenant).inc()
        if exchange.failure == "model_not_found":
            visit.refused = "model"
        if visit.refused:
            used.refused[visit.refused] = used.refused.get(visit.refused, 0) + 1
            metrics.tenant_refused.labels(tenant, visit.refused).inc()
        if visit.grant is None:
            return
        prompt, completion = tokens_used(exchange, visit)
        self._limits.settle(visit.grant, prompt + completion)
        used.prompt_tokens += prompt
        used.completion_tokens += completion
        metrics.tenant_tokens.labels(tenant, "prompt").inc(prompt)
        metrics.tenant_tokens.labels(tenant, "completion").inc(completion)

    @property
    def shared(self) -> bool:
        return self._limits.shared

    def usage(self) -> list[dict[str, Any]]:
        accounts = self._limits.accounts()
        return [
            {
                "tenant": tenant,
                **asdict(used),
                "inflight": sum(a.carried for a in accounts if a.key.tenant == tenant),
                "month_tokens": max((a.month_tokens for a in accounts if a.key.tenant == tenant), default=0),
                "keys": [_row(account) for account in accounts if account.key.tenant == tenant],
            }
            for tenant, used in sorted(self._used.items())
        ]

    async def open(self) -> None:
        self._limits.open()
        await self._keyring.refresh()

    async def close(self) -> None:
        await self._limits.close()
        await self._keyring.close()

    def running(self) -> Iterable[Callable[[], Coroutine[Any, Any, None]]]:
        return partial(self._keyring.run, self._changed), self._limits.run

    def _counted(self, send: Send, visit: Visit) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = rate_headers(visit.account)
                names = {name for name, _ in ours}
                theirs = (header for header in message.get("headers", ()) if header[0] not in names)
                message["headers"] = [*theirs, *ours]
            else:
                body = message.get("body", b"")
                visit.events += body.count(b"\n\n") if body != COMMENT else 0
                if not message.get("more_body", False):
                    self._limits.exit(visit)  # before the caller can come back
            await send(message)

        return counted

    def _changed(self) -> None:
        """Whoever has no key any more is forgotten: there are never more tenants than keys."""
        tenants = self._keyring.tenants
        self._limits.keep(self._keyring.ids, tenants)
        for gone in self._used.keys() - tenants:
            del self._used[gone]
            self._metrics.tenant_left(gone)


def answer_tokens(ask: Asked) -> int | None:
    """The most tokens an answer may have, all choices to all prompts together; None where nobody says."""
    named = (ask.max_completion_tokens, ask.max_tokens, ask.max_output_tokens)
    asked = [number for number in named if type(number) is int and number > 0]
    choices = ask.n if type(ask.n) is int and ask.n > 0 else 1
    prompt = getattr(ask, "prompt", None)  # of a completion: one, as text or ids, or a list of them
    several = len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1
    return min(max(asked), _MAX_ANSWER_TOKENS) * min(choices, _MAX_CHOICES) * several if asked else None


def tokens_used(exchange: Exchange, visit: Visit) -> tuple[int, int]:
    """Prompt and completion: what the worker says.  Where it does not (a stream without `include_usage`, or
    one that broke off): our count of the prompt, and of events, of which vLLM sends about one a token.
    Nothing for what was refused or never reached a worker."""
    usage, prompt, client = exchange.usage, exchange.prompt, exchange.client
    failed = max(client.status, exchange.answered) >= 400 or (exchange.failure and not client.answered)
    if prompt is None or visit.grant is None or not exchange.attempts or failed:
        return 0, 0
    counted = prompt.tokens if usage.prompt is None else usage.prompt
    if usage.completion is not None or usage.prompt is not None:
        return counted, usage.completion or 0
    if client.streams:
        return counted, max(0, visit.events - client.finished)  # [DONE] is none
    return counted, visit.grant.tokens - prompt.tokens if client.finished else 0


def rate_headers(account: Account) -> Headers:
    """OpenAI's `x-ratelimit-*`, of those limits that the key has."""
    key, standing = account.key, account.standing
    headers = []
    for name, limit, left, reset in (
        (b"requests", key.rpm, standing.requests_left, standing.requests_reset_ms),
        (b"tokens", key.tpm, standing.tokens_left, standing.tokens_reset_ms),
    ):
        if limit:
            headers.append((b"x-ratelimit-limit-" + name, b"%d" % limit))
            headers.append((b"x-ratelimit-remaining-" + name, b"%d" % left))
            headers.append((b"x-ratelimit-reset-" + name, duration(reset).encode()))
    return headers


def _row(account: Account) -> dict[str, Any]:
    key, standing = account.key, account.standing
    return {
        "id": key.id,
        "rpm": key.rpm,
        "tpm": key.tpm,
        "concurrency": key.concurrency,
        "tokens_per_month": key.tokens_per_month,
        "inflight": account.carried,
        "requests_left": _by_now(standing.requests_left, key.rpm, account),
        "tokens_left": _by_now(standing.tokens_left, key.tpm, account),
    }


def _by_now(left: int, limit: int, account: Account) -> int:
    """What was left when the key last asked, and what has drained away since."""
    return min(limit, left + int((time.monotonic() - account.asked) * limit / 60))
