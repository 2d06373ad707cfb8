"""What a key may use: requests and tokens a minute, requests at once, tokens a month, over all gateways.

A minute's worth is a leaky bucket: what is used drains away evenly, so one number and its time are all there
is to keep, there is no edge of a window to crowd around, and "when is there room?" has an exact answer.
Tokens are taken as an estimate (prompt and max_tokens) and settled with what the answer says it used.  Places
are not counted up and down: each gateway says how many it carries, again and again, and what a dead one said
expires.

One script in Redis decides for all gateways, in one round trip that also brings what earlier requests
settled.  Where it does not answer, a copy of the script in this process takes over with limit/N, N being the
gateways last known to live.  Nothing here fails a request because of Redis.
"""

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gateway.errors import TooMany
from gateway.keyring import Key
from gateway.limits_book import Book, Question, Standing, Verdict
from gateway.limits_redis import LEASE_SECONDS, Gateways, LimitsDown, LimitsScript

BEAT_SECONDS = 3.0
DEADLINE_SECONDS = 0.025  # at least; a late answer makes a limit coarser, not a request wrong
DEFAULT_ANSWER_TOKENS = 1024  # taken where a request names no max_tokens
_PLACES_WAIT_MS = 1000  # nobody knows when a place is free


@dataclass(eq=False, slots=True)
class Account:
    """A key's use as this process knows it."""

    key: Key
    standing: Standing
    here: int = 0  # requests of this process, from their first line on
    carried: int = 0  # those of them that were let in
    settled: int = 0  # tokens of the minute that Redis has not heard of
    spent: int = 0  # tokens of the month that Redis has not heard of
    month_tokens: int = 0  # of the tenant, as last heard
    asked: float = 0.0  # monotonic time of `standing`
    heard: tuple[str, int] = ("", 0)  # what Redis last said: a month, and the tenant's tokens in it


@dataclass(slots=True)
class Grant:
    """A request's share; settle() takes it back."""

    account: Account
    tokens: int
    shared: bool  # taken from Redis
    placed: bool = True  # it counts as carried
    open: bool = True


@dataclass(slots=True)
class Visit:
    """What is held for one request of a tenant."""

    account: Account
    grant: Grant | None = None
    inside: bool = False  # it counts as here
    refused: str = ""  # what was short
    events: int = 0  # of a stream, as far as it went


class Limits:
    """REQUIRES: used from one event loop."""

    def __init__(self, url: str = "", deadline: float = DEADLINE_SECONDS) -> None:
        """Without a `url` every limit is this process's own.  Raises ConfigError."""
        self._name = secrets.token_hex(8)
        self._script = LimitsScript(url, max(deadline, DEADLINE_SECONDS)) if url else None
        self.gateways = Gateways(url, self._name) if url else None
        self._book = Book()
        self._accounts: dict[str, Account] = {}
        self._untold: dict[str, Account] = {}
        self._wake = asyncio.Event()

    def open(self) -> None:
        """Start connecting.  REQUIRES: a running loop."""
        if self._script:
            self._script.open()

    async def close(self) -> None:
        """Idempotent."""
        await self._flush()
        if self._script:
            await self._script.close()
        if self.gateways:
            await self.gateways.close()

    @property
    def shared(self) -> bool:
        """Whether Redis would be asked now."""
        return self._script is not None and self._script.up

    def account(self, key: Key) -> Account:
        held = self._accounts.get(key.id)
        if held is None:
            full = Standing(0, 0, key.rpm, 0, key.tpm, 0, 0)
            held = self._accounts[key.id] = Account(key, full)
        held.key = key
        return held

    def accounts(self) -> list[Account]:
        """Of all keys that asked for something."""
        return [*self._accounts.values()]

    def keep(self, keys: set[str], tenants: set[str]) -> None:
        """Forget everybody else, but not who has something under way."""
        for name, account in [*self._accounts.items()]:
            if name not in keys and not account.here + account.carried and name not in self._untold:
                del self._accounts[name]
        self._book.keep(tenants)

    def enter(self, visit: Visit) -> None:
        """Nothing is done, not even read, for more requests at once than the key may have of all gateways;
        what others carry take() counts.  Raises TooMany."""
        account = visit.account
        if 0 < account.key.concurrency <= account.here:
            visit.refused = "concurrency"
            raise refusal(account.key, account.standing._replace(verdict=Verdict.PLACES), 0)
        account.here += 1
        visit.inside = True

    def exit(self, visit: Visit) -> None:
        """Somebody else may come.  Idempotent."""
        visit.account.here -= visit.inside
        visit.inside = False
        if visit.grant is not None:
            self.leave(visit.grant)

    async def take(self, key: Key, prompt_tokens: int, answer_tokens: int | None) -> Grant:
        """`answer_tokens`: the most that the answer may have; None: nobody said.  Raises TooMany."""
        if answer_tokens is None:
            room = max(1, key.tpm - prompt_tokens) if key.tpm else DEFAULT_ANSWER_TOKENS
            answer_tokens = min(DEFAULT_ANSWER_TOKENS, room)
        tokens = prompt_tokens + answer_tokens
        account = self.account(key)
        account.carried += 1
        grant: Grant | None = None
        try:
            grant = await self._granted(account, tokens)
            return grant
        finally:
            if grant is None:
                account.carried -= 1
                self._tell(account)  # when cancelled, Redis may believe that it is carried

    def leave(self, grant: Grant) -> None:
        """Its place is free again.  Idempotent."""
        if grant.placed:
            grant.placed = False
            grant.account.carried -= 1
            self._tell(grant.account)

    def settle(self, grant: Grant, used: int) -> None:
        """The request is over and used so many tokens.  Idempotent."""
        self.leave(grant)
        if not grant.open:
            return
        grant.open = False
        account, key = grant.account, grant.account.key
        account.spent += used
        self._book.spend(key.tenant, _month(), used)
        if grant.shared:
            account.settled += used - grant.tokens
        else:
            self._book.ask(key.tenant, self._own(account, settled=used - grant.tokens), _now_ms())
        self._tell(account)

    async def run(self) -> None:
        """Tell Redis what was settled, at once; and again and again who is here and what is carried."""
        if self._script is None or self.gateways is None:
            return
        beat = time.monotonic()
        while True:
            if time.monotonic() >= beat:
                beat = time.monotonic() + BEAT_SECONDS
                await self.gateways.beat()
                for account in self._accounts.values():
                    if account.carried:
                        self._tell(account)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, beat - time.monotonic())):
                    await self._wake.wait()
            self._wake.clear()
            if not await self._flush():
                await asyncio.sleep(1.0)

    def _tell(self, account: Account) -> None:
        if self._script is not None:
            self._untold[account.key.id] = account
            self._wake.set()

    async def _flush(self) -> bool:
        """False when Redis did not hear all of it."""
        while self._untold:
            name, account = self._untold.popitem()
            try:
                await self._ask(account)
            except LimitsDown:
                self._untold[name] = account
                return False
        return True

    async def _granted(self, account: Account, tokens: int) -> Grant:
        """Raises TooMany."""
        try:
            standing, shared = await self._ask(account, take=True, tokens=tokens), True
        except LimitsDown:
            question = self._own(account, take=True, tokens=tokens)
            tokens = question.tokens
            standing, shared = self._book.ask(account.key.tenant, question, _now_ms()), False
        account.standing, account.month_tokens = standing, standing.month_tokens
        account.asked = time.monotonic()
        if standing.verdict != Verdict.TAKEN:
            raise refusal(account.key, standing, tokens)
        return Grant(account, tokens, shared)

    async def _ask(self, account: Account, take: bool = False, tokens: int = 0) -> Standing:
        """Raises LimitsDown; what was to be settled is then kept, unless Redis may have heard it."""
        if self._script is None:
            raise LimitsDown(heard=False)
        question = self._question(account, account.key.rpm, account.key.tpm, account.key.concurrency)
        question.take, question.tokens = take, tokens
        question.settled, question.spent = account.settled, account.spent
        question.known = account.heard[1] if account.heard[0] == question.month else 0
        account.settled = account.spent = 0
        try:
            standing = await self._script.ask(account.key.tenant, question)
        except LimitsDown as exc:
            if not exc.heard:
                account.settled += question.settled
                account.spent += question.spent
            raise
        account.month_tokens = standing.month_tokens
        account.heard = (question.month, standing.month_tokens)
        self._book.knew(account.key.tenant, question.month, standing.month_tokens)
        return standing

    def _own(self, account: Account, take: bool = False, tokens: int = 0, settled: int = 0) -> Question:
        """For our own book: our part of each limit, but never nothing; the month is not divided.  A request
        that fits into the whole minute is let in when our part of it is unused."""
        key, parts = account.key, self.gateways.alive if self.gateways else 1
        tpm = key.tpm and max(1.0, key.tpm / parts)
        places = key.concurrency and max(1, key.concurrency // parts)
        question = self._question(account, key.rpm and max(1.0, key.rpm / parts), tpm, places)
        fits = tokens if tokens > key.tpm else min(tokens, int(tpm))
        question.take, question.tokens, question.settled = take, fits, settled
        return question

    def _question(self, account: Account, rpm: float, tpm: float, concurrency: int) -> Question:
        return Question(
            key=account.key.id,
            gateway=self._name,
            month=_month(),
            carried=account.carried,
            lease=int(LEASE_SECONDS * 1000),
            rpm=rpm,
            tpm=tpm,
            concurrency=concurrency,
            budget=account.key.tokens_per_month,
        )


def refusal(key: Key, standing: Standing, tokens: int) -> TooMany:
    """What a client is told, in OpenAI's words where it has some."""
    wait = standing.wait_ms
    later = f"Please try again in {duration(wait)}."
    match standing.verdict:
        case Verdict.MONTH:
            left = max(0, key.tokens_per_month - standing.month_tokens)
            return TooMany(
                f"You exceeded your quota: {left} of {key.tokens_per_month} tokens are left for this month "
                f"(UTC), and this request may need {tokens}.",
                "insufficient_quota",
                "month",
                _until_next_month_ms(),
                again=False,
            )
        case Verdict.PLACES:
            return TooMany(
                f"Rate limit reached: {key.concurrency} requests at once. Please try again when one of them "
                "has ended.",
                "requests",
                "concurrency",
                _PLACES_WAIT_MS,
            )
        case Verdict.REQUESTS:
            return TooMany(
                f"Rate limit reached: {key.rpm} requests per minute. {later}", "requests", "requests", wait
            )
        case Verdict.TOKENS:
            said = f"Rate limit reached: {key.tpm} tokens per minute; this request may need {tokens}. {later}"
            return TooMany(said, "tokens", "tokens", wait)
    return TooMany(
        f"Request too large: it may need {tokens} tokens, and the limit is {key.tpm} per minute. Shorten the "
        "prompt or lower max_tokens.",
        "tokens",
        "tokens",
        None,
        again=False,
    )


def duration(ms: int) -> str:
    """As in OpenAI's headers: `120ms`, `1.5s`, `6m0s`, `1h2m3s`."""
    if ms < 1000:
        return f"{ms}ms"
    if ms < 60_000:
        return f"{ms / 1000:g}s"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"


def _now_ms() -> float:
    return time.monotonic() * 1000


def _month() -> str:
    return datetime.now(UTC).strftime("%Y-%m")


def _until_next_month_ms() -> int:
    now = datetime.now(UTC)
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return int(((first + timedelta(days=32)).replace(day=1) - now).total_seconds() * 1000)
