"""A prompt from the command line: what is sent to a worker, its token ids, the keys of its chunks.

The token ids are made by the gateway's own tokenizer from the worker's model folder, and count only after the
worker's /tokenize has answered two probes in the same way: keys made from other ids would name other chunks.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import msgspec

from cacheengine.index_schema import Lease
from cacheengine.keys import ChunkKey, KeyScheme
from cacheengine.wishes import parse_key
from gateway.ask import Ask
from gateway.handshake import PROBE_CHAT, PROBE_PROMPT
from gateway.launch.errors import LaunchError, UsageError
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer

_TIMEOUT_SECONDS = 10.0
_MOST_TOKEN = 1 << 32


@dataclass(frozen=True)
class Prompt:
    """Either a request's body, or chunk keys that somebody has already."""

    body: dict[str, Any]
    given: tuple[ChunkKey, ...] = ()

    @property
    def chat(self) -> bool:
        return "messages" in self.body

    @cached_property
    def ask(self) -> Ask:
        return msgspec.convert(self.body, Ask)

    def keys(self, scheme: KeyScheme, ids: Sequence[int]) -> list[ChunkKey]:
        """In prompt order; the given ones where there is no text."""
        return list(self.given) or scheme.keys(ids, self.ask.tags)


def read_prompt(
    text: str | None, file: Path | None, messages: Path | None, tokens: Path | None, keys: Sequence[str]
) -> Prompt:
    """Exactly one of the ways to name a prompt.  Raises UsageError."""
    given = [way for way in (text, file, messages, tokens) if way is not None]
    if len(given) + bool(keys) != 1:
        raise UsageError("name one prompt: --prompt, --file, --messages, --tokens, or chunk keys")
    if text is not None:
        return Prompt({"prompt": text})
    if file is not None:
        return Prompt({"prompt": _text(file)})
    if messages is not None:
        return Prompt(_messages(messages))
    if tokens is not None:
        return Prompt({"prompt": _tokens(tokens)})
    return Prompt({}, read_keys(keys))


def read_keys(texts: Sequence[str]) -> tuple[ChunkKey, ...]:
    """Raises UsageError."""
    parsed = {text: parse_key(text) for text in texts}
    for text, key in parsed.items():
        if key is None:
            raise UsageError(f"{text!r} is no chunk key: 32 hex digits, as the keys in Redis end")
    return tuple(key for key in parsed.values() if key)


def tokens_of(prompt: Prompt, lease: Lease, folder: str) -> list[int]:
    """Token ids of the prompt for this worker's model.  Raises LaunchError.

    `folder` overrides the model folder the worker announces.
    """
    if isinstance(prompt.body.get("prompt"), list):
        return list(prompt.body["prompt"])
    where = Path(folder or lease.info.model_path)
    try:
        tokenizer = ModelTokenizer.load(where)
    except (OSError, ValueError) as exc:
        raise LaunchError(
            f"no tokenizer of {lease.info.model} at {where} ({exc}); name its folder with --tokenizer"
        ) from None
    _agree(tokenizer, lease)
    return _ids(tokenizer, prompt.ask, prompt.chat)


def _ids(tokenizer: ModelTokenizer, ask: Ask, chat: bool) -> list[int]:
    try:
        return tokenizer.tokens(ask, chat).ids
    except Unkeyable as exc:
        raise UsageError(f"this prompt has no chunk keys ({exc.reason}): only text is keyed") from None


def _agree(tokenizer: ModelTokenizer, lease: Lease) -> None:
    """The gateway's handshake.  A worker that does not answer, or cannot do such a prompt, is taken at its
    word.  Raises LaunchError where the ids differ."""
    info = lease.info
    for body, chat in (({"messages": PROBE_CHAT}, True), ({"prompt": PROBE_PROMPT}, False)):
        try:
            reply = httpx.post(
                f"{info.url.rstrip('/')}/tokenize",
                json={"model": info.model, **body},
                timeout=_TIMEOUT_SECONDS,
                trust_env=False,
            )
            theirs = reply.json()["tokens"] if reply.status_code == 200 else None
            ours = tokenizer.tokens(msgspec.convert(body, Ask), chat).ids
        except (httpx.HTTPError, ValueError, LookupError, TypeError, Unkeyable):
            continue
        if theirs is not None and theirs != ours:
            raise LaunchError(f"worker {info.worker_id} tokenizes unlike this machine; see `cairn doctor`")


def _text(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError:
        raise UsageError(f"{path} is not JSON") from None


def _messages(path: Path) -> dict[str, Any]:
    held = _json(path)
    body = {"messages": held} if isinstance(held, list) else held
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise UsageError(f"{path} must hold a list of chat messages, or a chat request with one")
    return body


def _tokens(path: Path) -> list[int]:
    held = _json(path)
    if not isinstance(held, list) or not all(type(i) is int and 0 <= i < _MOST_TOKEN for i in held):
        raise UsageError(f"{path} must hold a JSON list of token ids")
    return held
