"""`cairn keys create|list|revoke`: who may call the gateways, and how much.

A key is printed once, by `create`, on standard output.  Gateways hear of a change within two seconds.
"""

import asyncio
import json
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cacheengine.config import ConfigError
from gateway.keyring import SECRET, FileKeys, Key, KeysDown, RedisKeys, Store, new_key, records
from gateway.launch import state
from gateway.launch.config import load_settings
from gateway.launch.errors import LaunchError, UsageError

keys_app = typer.Typer(help="API keys of the gateways.", no_args_is_help=True)

_SPAN = re.compile(r"(\d{1,9})([smhdw])")
_TOLD_AGAIN_SECONDS = 4.0  # within which gateways notice that Redis lost its memory
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

RedisUrl = Annotated[
    str | None,
    typer.Option(help="Default: CAIRN_REDIS_URL (the place for a password), else the running stack's."),
]
File = Annotated[
    Path | None,
    typer.Option("--file", help="The gateway's keys_file, instead of Redis.", envvar="CAIRN_KEYS_FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

T = TypeVar("T")


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    models: Annotated[str, typer.Option(help="Names it may use, as a,b. Default: all.")] = "",
    rpm: Annotated[int, typer.Option(min=0, help="Requests a minute; 0: no limit.")] = 0,
    tpm: Annotated[int, typer.Option(min=0, help="Tokens a minute, prompt and answer; 0: no limit.")] = 0,
    concurrency: Annotated[int, typer.Option(min=0, help="Requests at once; 0: no limit.")] = 0,
    tokens_per_month: Annotated[
        int, typer.Option(min=0, help="Tokens of the whole tenant in a UTC month; 0: no limit.")
    ] = 0,
    priority: Annotated[int, typer.Option(help="Lower goes first where requests wait.")] = 0,
    weight: Annotated[float, typer.Option(help="The tenant's share among equals.")] = 1.0,
    expires: Annotated[str, typer.Option(help="After 30d, 12h, 8w …. Default: never.")] = "",
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Share cached prompts with no other tenant.")
    ] = False,
    redis_url: RedisUrl = None,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it.  It cannot be shown again."""
    now = int(time.time())
    said, digest = new_key()
    try:
        record = Key(
            id="key_" + secrets.token_hex(6),
            tenant=tenant,
            digest=digest,
            created=now,
            expires=now + _span(expires) if expires else 0,
            models=tuple(name.strip() for name in models.split(",") if name.strip()),
            rpm=rpm,
            tpm=tpm,
            concurrency=concurrency,
            tokens_per_month=tokens_per_month,
            priority=priority,
            weight=weight,
            isolate=isolate,
        )
    except ValueError as exc:
        raise UsageError(str(exc)) from None

    async def make(store: Store, held: dict[str, str]) -> None:
        if not held and isinstance(store, RedisKeys):
            held = await _remembered(store)
        if not held.get(SECRET):
            await store.put(SECRET, secrets.token_hex(32))
        await store.put(digest, msgspec.json.encode(record).decode())

    _with(redis_url, file, make)
    if as_json:
        typer.echo(json.dumps({"key": said} | _plain(record), indent=1))
        return
    typer.echo(said)
    typer.echo(f"{record.id} of {tenant}: keep the key, it cannot be shown again", err=True)


@keys_app.command("list")
def show(redis_url: RedisUrl = None, file: File = None, as_json: AsJson = False) -> None:
    """Every key's record, never the key."""

    async def look(store: Store, held: dict[str, str]) -> list[Key]:
        return sorted(records(held).values(), key=lambda key: (key.tenant, key.created, key.id))

    keys = _with(redis_url, file, look)
    if as_json:
        typer.echo(json.dumps([_plain(key) for key in keys], indent=1))
    elif keys:
        Console(width=None if sys.stdout.isatty() else 160).print(_table(keys))
    else:
        typer.echo("there is no key yet: cairn keys create --tenant NAME")


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `cairn keys list` shows it.")],
    redis_url: RedisUrl = None,
    file: File = None,
) -> None:
    """Take a key back: for ever, and within two seconds at every gateway."""

    async def remove(store: Store, held: dict[str, str]) -> Key:
        found = next((key for key in records(held).values() if key.id == key_id), None)
        if found is None:
            raise UsageError(f"no key is called {key_id!r}; `cairn keys list` shows them")
        await store.put(found.digest, "")
        return found

    gone = _with(redis_url, file, remove)
    typer.echo(f"{gone.id} of {gone.tenant} is revoked", err=True)


def _with(
    redis_url: str | None, file: Path | None, work: Callable[[Store, dict[str, str]], Awaitable[T]]
) -> T:
    """Run `work` on the store and what it holds.  Raises LaunchError."""

    async def run() -> T:
        store = _store(redis_url, file)
        try:
            held = {} if isinstance(store, FileKeys) and not store.there else dict(await store.read())
            return await work(store, held)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except KeysDown as exc:
        raise LaunchError(str(exc)) from None


def _store(redis_url: str | None, file: Path | None) -> Store:
    """Raises UsageError."""
    if file and not redis_url:
        return FileKeys(file)
    settings = load_settings()
    stack = state.read(settings.root)
    url = redis_url or settings.redis_url or (stack.redis_url if stack else "")
    if not url:
        raise UsageError("nowhere to keep keys: set CAIRN_REDIS_URL, start a stack, or name a --file")
    try:
        return RedisKeys(url)
    except ConfigError as exc:
        raise UsageError(str(exc)) from None


async def _remembered(store: Store) -> dict[str, str]:
    """What an empty Redis holds in the end: if it lost its memory, gateways will tell it again, and undo what
    was written before."""
    until = time.monotonic() + _TOLD_AGAIN_SECONDS
    while not (held := await store.read()) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    return dict(held)


def _span(text: str) -> int:
    """Seconds.  Raises UsageError."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise UsageError("--expires takes a number and s, m, h, d or w, as 30d")
    return int(found[1]) * _SECONDS[found[2]]


def _plain(key: Key) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.structs.asdict(key)
    del fields["digest"]
    return fields | {"models": [*key.models], "expired": key.expired(time.time())}


def _table(keys: list[Key]) -> Table:
    out = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("id", "tenant"):
        out.add_column(name, no_wrap=True)
    for name in ("rpm", "tpm", "at once", "a month", "priority", "weight"):
        out.add_column(name, justify="right")
    for name in ("models", "isolated", "created", "expires"):
        out.add_column(name)
    for key in keys:
        limits = (key.rpm, key.tpm, key.concurrency, key.tokens_per_month)
        out.add_row(
            key.id,
            key.tenant,
            *(f"{limit:,}" if limit else "–" for limit in limits),
            str(key.priority),
            f"{key.weight:g}",
            ", ".join(key.models) or "all",
            "yes" if key.isolate else "no",
            _day(key.created),
            ("[red]expired[/]" if key.expired(time.time()) else _day(key.expires))
            if key.expires
            else "never",
        )
    return out


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
