"""A body to what routing needs of it: the served model, the prompt's chunk keys, or why there are none."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

from cacheengine.keys import ChunkKey, KeyScheme
from gateway.ask import Ask, read_ask, renamed
from gateway.errors import BadRequest, NoWorker, UnknownModel
from gateway.exchange import Prompt
from gateway.handshake import Handshake
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from router.registry import Registry

_INLINE_BYTES = 8192  # a shorter body is tokenized on the loop: handing it to a thread costs more
_AFFINITY_BYTES = 1024  # of a body without keys: the start of a conversation
_BYTES_PER_TOKEN = 4  # a guess, for the load board, where the prompt was not tokenized


class Prompts:
    """REQUIRES: used from one event loop; everything passed in outlives it."""

    def __init__(
        self, registry: Registry, handshake: Handshake, pool: Executor, aliases: Mapping[str, str]
    ) -> None:
        self._registry, self._handshake, self._pool, self._aliases = registry, handshake, pool, aliases

    def read(self, body: bytes) -> tuple[Ask, str, bytes]:
        """What was asked, the served name, and the body for the worker: as it came, unless an alias was used.
        Raises GatewayError."""
        ask = read_ask(body)
        model = self._served(ask)
        return ask, model, renamed(body, model) if ask.model in self._aliases else body

    def _served(self, ask: Ask) -> str:
        """The served name asked for.  Raises UnknownModel, NoWorker, BadRequest."""
        name = self._aliases.get(ask.model or "", ask.model)
        if name is not None and self._registry.workers_for(name):
            return name
        known = [*self._registry.describe()]
        bases = {str(worker["model"]) for worker in known}
        if name is None and len(bases) == 1:
            return bases.pop()
        if name is None and bases:
            raise BadRequest("You must provide a model parameter.", "model")
        served = bases.union(*(worker["adapters"] for worker in known))
        if not known or name in served or ask.model in self._aliases:
            raise NoWorker(ask.model or "")
        raise UnknownModel(ask.model or "")

    async def prompt(self, model: str, ask: Ask, body: bytes, chat: bool) -> Prompt:
        """Chunk keys where we can make them; else the body's first bytes keep a conversation together."""
        keys: Sequence[ChunkKey] = ()
        total, unkeyed, alone = len(body) // _BYTES_PER_TOKEN, "", True
        registry = self._registry
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


def _keys(
    tokenizer: ModelTokenizer, scheme: KeyScheme, ask: Ask, chat: bool, tags: Sequence[tuple[str, str]]
) -> tuple[Sequence[ChunkKey], int, bool]:
    """Chunk keys of the (longest) prompt, the tokens of all, whether it is alone.  Raises Unkeyable."""
    tokens = tokenizer.tokens(ask, chat)
    return scheme.keys(tokens.ids, tags), tokens.total, tokens.total == len(tokens.ids)
