"""What is known of one request under way."""

from collections.abc import Sequence
from dataclasses import dataclass

from cacheengine.keys import ChunkKey
from gateway.proxy import Client
from gateway.usage import NO_USAGE, Usage


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
    usage: Usage = NO_USAGE  # what the worker says it cost; also of an answer that broke off
