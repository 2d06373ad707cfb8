"""A body to what routing needs of it: the served model, the prompt's chunk keys, or why there are none."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import msgspec

from cacheengine.keys import ChunkKey, KeyScheme
from gateway.ask import Ask, Asked, read, read_ask, renamed
from gateway.dialects import Messages, Responses
from gateway.endpoints import ENDPOINTS, Endpoint, Text
from gateway.errors import BadRequest, NoWorker, UnknownModel
from gateway.exchange import Exchange, Prompt
from gateway.handshake import Handshake
from gateway.keyring import ANONYMOUS, Key
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from router.registry import Registry

_INLINE_BYTES = 8192  # a shorter body is tokenized on the loop: handing it to a thread costs more
_AFFINITY_BYTES = 1024  # of a body without keys: the start of a conversation
_BYTES_PER_TOKEN = 4  # a guess, for the load board, where the prompt was not tokenized

_DECODERS: Mapping[Text, msgspec.json.Decoder[Any]] = {
    "chat": msgspec.json.Decoder(Ask),
    "prompt": msgspec.json.Decoder(Ask),
    "messages": msgspec.json.Decoder(Messages),
    "responses": msgspec.json.Decoder(Responses),
    "none": msgspec.json.Decoder(Asked),
}


class Prompts:
    """REQUIRES: used from one event loop; everything passed in outlives it."""

    def __init__(
        self, registry: Registry, handshake: Handshake, pool: Executor, aliases: Mapping[str, str]
    ) -> None:
        self._registry, self._handshake, self._pool, self._aliases = registry, handshake, pool, aliases

    def read(self, exchange: Exchange) -> tuple[Asked, str, bytes]:
        """What was asked, the served name, and the body for the worker: as it came, unless an alias was used.
        Raises GatewayError."""
        if exchange.upload is None:
            return self.read_body(exchange.body, exchange.endpoint, exchange.caller)
        asked = Asked(model=exchange.upload.model)
        try:
            model = self._served(asked, exchange.caller)
        except BadRequest as exc:
            raise BadRequest("Send the `model` field, and before the file.", "model") from exc
        exchange.upload.decide(model)
        return asked, model, b""

    def read_body(self, body: bytes, endpoint: Endpoint, key: Key = ANONYMOUS) -> tuple[Asked, str, bytes]:
        """The same of a body that is here.  Raises GatewayError; a model that `key` is not for does not
        exist."""
        asked = read(_DECODERS[endpoint.text], body)
        asked.check()
        model = self._served(asked, key)
        return asked, model, renamed(body, model) if asked.model in self._aliases else body

    def guess(self, body: bytes) -> Endpoint:
        """Whose body this is, where nobody says.  Raises GatewayError."""
        return ENDPOINTS["/v1/chat/completions" if read_ask(body).messages is not None else "/v1/completions"]

    def _served(self, ask: Asked, key: Key) -> str:
        """The served name asked for.  Raises UnknownModel, NoWorker, BadRequest."""
        name = self._aliases.get(ask.model or "", ask.model)
        if name is not None and not key.may_use(ask.model, name):
            raise UnknownModel(ask.model or "")
        if name is not None and self._registry.workers_for(name):
            return name
        known = [*self._registry.describe()]
        bases = {model for worker in known if key.may_use(model := str(worker["model"]))}
        if name is None and len(bases) == 1:
            return bases.pop()
        if name is None and bases:
            raise BadRequest("You must provide a model parameter.", "model")
        served = bases.union(*(worker["adapters"] for worker in known))
        if not known or name in served or ask.model in self._aliases:
            raise NoWorker(ask.model or "")
        raise UnknownModel(ask.model or "")

    async def prompt(self, model: str, asked: Asked, body: bytes, endpoint: Endpoint) -> Prompt:
        """Chunk keys where we can make them; else the body's first bytes keep a conversation together."""
        keys: Sequence[ChunkKey] = ()
        total, unkeyed, alone = len(body) // _BYTES_PER_TOKEN, "", True
        registry = self._registry
        try:
            if endpoint.text == "none":
                raise Unkeyable("endpoint")
            scheme = registry.scheme(model)
            if scheme is None:
                raise Unkeyable("no_scheme")
            workers = (w for w in registry.workers_for(model) if w.scheme == scheme)
            tokenizer = next(filter(None, map(self._handshake.tokenizer, workers)), None)
            if tokenizer is None:
                raise Unkeyable("no_tokenizer")
            lora = model if registry.adapter(model) else ""
            work = partial(_keys, tokenizer, scheme, asked, endpoint.text != "prompt", lora)
            if len(body) <= _INLINE_BYTES:
                keys, total, alone = work()
            else:
                keys, total, alone = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except Unkeyable as exc:
            unkeyed = exc.reason
        return Prompt(model, keys, total, body[:_AFFINITY_BYTES], unkeyed, asked.session, alone)


def _keys(
    tokenizer: ModelTokenizer, scheme: KeyScheme, asked: Asked, chat: bool, lora: str
) -> tuple[Sequence[ChunkKey], int, bool]:
    """Chunk keys of the (longest) prompt, the tokens of all, whether it is alone.  Raises Unkeyable."""
    try:
        ask = asked.chat()
    except (AttributeError, LookupError, TypeError) as exc:  # of a type that the worker refuses
        raise Unkeyable("messages") from exc
    tokens = tokenizer.tokens(ask, chat)
    tags = (*ask.tags, ("lora", lora)) if lora else ask.tags
    return scheme.keys(tokens.ids, tags), tokens.total, tokens.total == len(tokens.ids)
