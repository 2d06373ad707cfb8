"""`cairn lookup|inspect|warm|pin|unpin|clear`: look into the cache, and tell it what to keep.

Flags and printing; questions are asked in cache_view, wishes said in cache_deeds.  Wishes are data in Redis
that workers obey within a heartbeat, so nothing here needs a worker's address, except to compute.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import redis
import typer
from rich.console import Console
from rich.progress import Progress
from rich.prompt import Confirm

from cacheengine.index_schema import Lease
from cacheengine.keys import ChunkKey, KeyScheme
from cacheengine.redis_url import DOWN
from cacheengine.wishes import TooManyPins, Verb
from gateway import cache_view
from gateway.cache_deeds import keep_blobs, namespaces_of, say, unlink_blobs, wait
from gateway.cache_print import card, show, table
from gateway.cache_prompt import Prompt, read_keys, read_prompt, tokens_of
from gateway.cache_view import Row
from gateway.launch import state
from gateway.launch.config import load_settings
from gateway.launch.errors import LaunchError, UsageError

cache_app = typer.Typer()

API_KEY = "CAIRN_API_KEY"  # where a gateway asks for one; never in argv

Text = Annotated[str | None, typer.Option("--prompt", help="The prompt of a completion.")]
File = Annotated[Path | None, typer.Option("--file", help="A text file with one; - is standard input.")]
Messages = Annotated[
    Path | None, typer.Option("--messages", help="JSON: a list of chat messages, or a chat request.")
]
Tokens = Annotated[Path | None, typer.Option("--tokens", help="JSON: a list of token ids.")]
Keys = Annotated[list[str] | None, typer.Argument(help="Chunk keys, 32 hex digits each.", show_default=False)]
Model = Annotated[
    str | None, typer.Option("--model", help="As clients say it. Default: the only one served.")
]
Tokenizer = Annotated[
    str, typer.Option(help="Model folder here. Default: the worker's.", envvar="CAIRN_TOKENIZER_PATH")
]
RedisUrl = Annotated[
    str | None,
    typer.Option(help="Default: CAIRN_REDIS_URL (the place for a password), else the running stack's."),
]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the workers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@dataclass(frozen=True)
class Place:
    """Where we look: Redis, and the gateway of the stack beside it."""

    url: str
    gateway: str
    client: redis.Redis

    def alive(self) -> list[Lease]:
        return cache_view.leases(self.url)


@dataclass(frozen=True)
class Found:
    """A prompt for one namespace: its workers, its keys there, and how many tokens those name."""

    scheme: KeyScheme
    group: list[Lease]
    keys: list[ChunkKey]
    tokens: int

    @property
    def namespace(self) -> str:
        return self.group[0].info.namespace

    def plain(self) -> dict[str, Any]:
        return {
            "model": self.group[0].info.model,
            "namespace": self.namespace,
            "chunk_tokens": self.scheme.chunk_tokens,
            "tokens": self.tokens,
            "keys": [key.hex() for key in self.keys],
        }


@cache_app.command()
def lookup(
    prompt: Text = None,
    file: File = None,
    messages: Messages = None,
    tokens: Tokens = None,
    key: Annotated[list[str] | None, typer.Option("--key", help="Chunk keys, in order; repeat it.")] = None,
    model: Model = None,
    tokenizer: Tokenizer = "",
    redis_url: RedisUrl = None,
    as_json: AsJson = False,
) -> None:
    """How much of a prompt each worker holds, and in which tier."""
    with _opened(redis_url) as place:
        asked = read_prompt(prompt, file, messages, tokens, key or [])
        _tell(place, _find(place, asked, model, tokenizer), asked, as_json)


@cache_app.command()
def inspect(keys: Keys = None, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Who holds a chunk, and what its blob in Redis says of itself, payload checked."""
    with _opened(redis_url) as place:
        wanted = read_keys(keys or [])
        if not wanted:
            raise UsageError("name chunk keys to inspect; `cairn lookup --json` lists a prompt's")
        groups = cache_view.by_scheme(place.alive()).values()
        facts = [
            fact
            for one in wanted
            for group in groups
            if (fact := cache_view.inspect(place.client, group, one))
        ]
        if as_json:
            typer.echo(json.dumps(facts, indent=1))
        for fact in [] if as_json else facts:
            show(card(fact))
        missing = {one.hex() for one in wanted} - {fact["key"] for fact in facts}
        if missing:
            raise LaunchError(f"nobody alive knows {', '.join(sorted(missing))}")


@cache_app.command()
def warm(
    prompt: Text = None,
    file: File = None,
    messages: Messages = None,
    tokens: Tokens = None,
    model: Model = None,
    tokenizer: Tokenizer = "",
    worker: Annotated[
        str | None, typer.Option(help="Id of the worker. Default: the gateway's choice.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The gateway. Default: the running stack's.")] = None,
    redis_url: RedisUrl = None,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Compute a prompt now, and wait until it is stored, so that the next one who asks does not wait."""
    with _opened(redis_url) as place:
        asked = read_prompt(prompt, file, messages, tokens, [])
        parts = _find(place, asked, model, tokenizer)
        target, part = _target(parts, worker, url or place.gateway)
        key = os.environ.get(API_KEY, "") if worker is None else ""
        started = time.monotonic()
        with Console(stderr=True).status(f"computing {part.tokens} tokens …"):
            answer = _compute(target, asked, part.group[0].info.model, timeout, key)
        with Console(stderr=True).status("waiting until they are stored …"):
            rows = _stored(place, part, worker, started + timeout)
        usage = answer.get("usage") or {}
        already = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        total = usage.get("prompt_tokens", part.tokens)
        result = {
            "computed_tokens": total - already,
            "cached_tokens": already,
            "seconds": round(time.monotonic() - started, 3),
            "stored_chunks": max((row.hit for row in rows), default=0),
        }
        if as_json:
            typer.echo(json.dumps(result | {"workers": [asdict(row) for row in rows]}, indent=1))
            return
        typer.echo(
            "{computed_tokens} tokens computed, {cached_tokens} were there already, "
            "{stored_chunks} chunks stored, {seconds:.1f} s".format(**result)
        )
        show(table(rows))


def _add_wish(verb: Verb, what: str) -> None:
    """`cairn pin` and `cairn unpin` take a prompt in the same ways."""

    @cache_app.command(verb, help=what)
    def command(
        keys: Keys = None,
        prompt: Text = None,
        file: File = None,
        messages: Messages = None,
        tokens: Tokens = None,
        model: Model = None,
        tokenizer: Tokenizer = "",
        redis_url: RedisUrl = None,
        timeout: Timeout = 30.0,
        as_json: AsJson = False,
    ) -> None:
        with _opened(redis_url) as place:
            asked = read_prompt(prompt, file, messages, tokens, keys or [])
            _wish(place, verb, asked, _find(place, asked, model, tokenizer), timeout, as_json)


_add_wish(
    "pin",
    "Keep a prompt's chunks from eviction until they are unpinned, held now or later, also over restarts.",
)
_add_wish("unpin", "Let a prompt's chunks be evicted again.")


@cache_app.command()
def clear(
    model: Model = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    redis_url: RedisUrl = None,
    timeout: Timeout = 60.0,
) -> None:
    """Make every worker of a model forget all it has stored: host memory, disk, Redis.  Pins stay wishes."""
    with _opened(redis_url) as place:
        alive = place.alive()
        name = model or cache_view.serving(alive, None)[0].info.model
        namespaces = namespaces_of(place.client, alive, name)
        if not namespaces:
            raise LaunchError(f"no worker, alive or not, is known to serve {name!r}")
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("clear asks before it deletes; without a terminal, say --yes")
            if not Confirm.ask(f"Forget everything stored for {name}?"):
                raise typer.Exit(1)
        numbers = say(place.client, namespaces, "clear")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            blobs = _unlink(place, name, progress)
            late = _waited(place, "clear", numbers, timeout, progress)
            blobs += _unlink(place, name, progress)  # what was still being written
        typer.echo(f"{blobs} keys of {name} deleted from Redis")
        _done(place, numbers, late, "cleared", timeout)


# -- the work ------------------------------------------------------------------------------------------


def _wish(
    place: Place, verb: Verb, asked: Prompt, found: Sequence[Found], timeout: float, as_json: bool
) -> None:
    """Pin or unpin, then say who holds what.  Raises LaunchError."""
    if not any(part.keys for part in found):
        raise LaunchError(f"the prompt is shorter than a chunk of {found[0].scheme.chunk_tokens} tokens")
    numbers: dict[str, int] = {}
    for part in found:
        numbers |= say(place.client, [part.namespace], verb, part.keys)
        keep_blobs(place.client, part.group, part.keys, for_ever=verb == "pin")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        late = _waited(place, verb, numbers, timeout, progress)
    _tell(place, found, asked, as_json, f"{verb}ned")
    _done(place, numbers, late, f"{verb}ned", timeout)


def _find(place: Place, asked: Prompt, model: str | None, tokenizer: str) -> list[Found]:
    """The prompt's keys for every namespace that workers of its model live in.  Raises LaunchError."""
    name = model or asked.body.get("model")
    groups = cache_view.by_scheme(cache_view.serving(place.alive(), name))
    found = []
    for scheme, group in groups.items():
        ids = [] if asked.given else tokens_of(asked, group[0], tokenizer)
        found.append(Found(scheme, group, asked.keys(scheme, ids), len(ids)))
    return found


def _target(parts: Sequence[Found], worker: str | None, gateway: str) -> tuple[str, Found]:
    """The base URL to ask, and the namespace to watch.  Raises LaunchError."""
    if worker is None:
        return gateway, parts[0]
    for part in parts:
        for lease in part.group:
            if lease.info.worker_id == worker:
                return lease.info.url, part
    known = ", ".join(lease.info.worker_id for part in parts for lease in part.group)
    raise UsageError(f"no worker {worker!r} serves this model; there are: {known}")


def _compute(url: str, asked: Prompt, model: str, timeout: float, key: str) -> dict[str, Any]:
    """One token of the prompt's answer: the least that computes all of the prompt.  Raises LaunchError."""
    path = "/v1/chat/completions" if asked.chat else "/v1/completions"
    body = {
        name: value for name, value in asked.body.items() if name not in ("stream_options", "n", "best_of")
    }
    body |= {"model": model, "max_tokens": 1, "stream": False}
    body.pop("max_completion_tokens", None)
    try:
        known = {"authorization": f"Bearer {key}"} if key else None
        reply = httpx.post(url.rstrip("/") + path, json=body, headers=known, timeout=timeout, trust_env=False)
        answer = reply.json()
    except httpx.HTTPError as exc:
        raise LaunchError(f"no answer from {url} ({type(exc).__name__})") from None
    except ValueError:
        raise LaunchError(f"{url} answered {reply.status_code} and no JSON") from None
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        raise LaunchError(f"{url} asks for an API key: set {API_KEY} to one that is not isolated")
    if reply.status_code != httpx.codes.OK:
        said = (answer.get("error") or {}).get("message", "") if isinstance(answer, dict) else ""
        raise LaunchError(f"{url} answered {reply.status_code}: {said}")
    return dict(answer)


def _stored(place: Place, part: Found, worker: str | None, until: float) -> list[Row]:
    """The rows, once somebody (or `worker`) holds all of the prompt.  Raises LaunchError."""
    while True:
        rows = cache_view.rows(place.client, part.group, part.keys, loose=False)
        if any(row.hit == row.chunks for row in rows if worker in (None, row.worker)):
            return rows
        if time.monotonic() > until:
            best = max(row.hit for row in rows)
            raise LaunchError(f"computed, but only {best} of {len(part.keys)} chunks are stored so far")
        time.sleep(0.1)


def _unlink(place: Place, model: str, progress: Progress) -> int:
    deleted = 0
    bar = progress.add_task("deleting from Redis", total=int(place.client.dbsize()))
    for seen, gone in unlink_blobs(place.client, model):
        deleted += gone
        progress.update(bar, advance=seen)
    progress.remove_task(bar)
    return deleted


def _waited(
    place: Place, verb: Verb, numbers: dict[str, int], timeout: float, progress: Progress
) -> list[str]:
    bar = progress.add_task("waiting for the workers", total=None)

    def tell(done: int, total: int) -> None:
        progress.update(bar, description=f"{done} of {total} workers", completed=done, total=total)

    return wait(place.alive, verb, numbers, timeout, tell)


def _done(place: Place, numbers: dict[str, int], late: Sequence[str], what: str, timeout: float) -> None:
    """Raises LaunchError when somebody is late: it was said, and they will still obey."""
    total = sum(lease.info.namespace in numbers for lease in place.alive())
    if late:
        raise LaunchError(
            f"{total - len(late)} of {total} workers have {what} in {timeout:g} s; "
            f"not yet: {', '.join(late)} (they will, with a later heartbeat)"
        )
    typer.echo(f"{total} of {total} workers have {what}", err=True)


# -- printing ------------------------------------------------------------------------------------------


def _tell(place: Place, found: Sequence[Found], asked: Prompt, as_json: bool, what: str = "") -> None:
    """Who holds how much of the prompt."""
    loose = bool(asked.given)
    held = [cache_view.rows(place.client, part.group, part.keys, loose=loose) for part in found]
    if as_json:
        told = [
            part.plain() | {"workers": list(map(asdict, rows))}
            for part, rows in zip(found, held, strict=True)
        ]
        typer.echo(json.dumps(told, indent=1))
        return
    for part in found:
        tokens = f"{part.tokens} tokens, " if part.tokens else ""
        typer.echo(f"{tokens}{len(part.keys)} chunks of {part.scheme.chunk_tokens} {what}".rstrip())
    show(table([row for rows in held for row in rows]))


@contextmanager
def _opened(redis_url: str | None) -> Iterator[Place]:
    """Redis of flag, environment or running stack.  Raises LaunchError, also for Redis's own trouble."""
    try:
        settings = load_settings()
        stack = state.read(settings.root)
        url = redis_url or settings.redis_url or (stack.redis_url if stack else "")
        if not url:
            raise UsageError("no Redis to ask: start a stack with `cairn up`, or set CAIRN_REDIS_URL")
        with cache_view.connect(url) as client:
            yield Place(url, stack.url if stack else settings.url, client)
    except TooManyPins as exc:
        raise UsageError(str(exc)) from None
    except DOWN as exc:
        raise LaunchError(f"Redis refused or stopped answering ({type(exc).__name__})") from None
