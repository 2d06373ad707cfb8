"""What paths there are, and what is special about each: the whole surface that is relayed to workers.

Adding an endpoint is adding a line here.  The paths are vLLM 0.32's inference routes; whatever else a worker
serves for its operators (sleep, caches, adapters, profiles, weights) is not reachable through the gateway.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gateway.errors import ANTHROPIC, OPENAI, Dialect

Text = Literal["chat", "prompt", "messages", "responses", "none"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path of the surface.  `path` is also the metrics' label `route`."""

    path: str
    text: Text = "none"  # how the prompt is found in the body, for its chunk keys; none: routed by load
    body: Literal["json", "multipart"] = "json"
    streams: bool = False  # it may answer with server-sent events
    retriable: bool = True  # before its first byte another worker may get it, too
    generates: bool = False  # it spends tokens of the model's output
    dialect: Dialect = OPENAI  # the shape of our own refusals
    fields: Mapping[str, str] = field(default_factory=dict)  # for the OpenAPI page: field → JSON type


_SAID = {"messages": "array", "tools": "array"}
_TUNED = {"temperature": "number", "top_p": "number", "stream": "boolean"}
_SCORED = {"query": "any", "documents": "array", "top_n": "integer"}
_PAIRS = {"queries": "any", "documents": "any"}
_HEARD = {"file": "file", "language": "string", "response_format": "string", "stream": "boolean"}

_ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions", "chat", streams=True, generates=True,
        fields={**_SAID, **_TUNED, "max_completion_tokens": "integer", "response_format": "object"},
    ),
    Endpoint(
        "/v1/completions", "prompt", streams=True, generates=True,
        fields={"prompt": "any", **_TUNED, "max_tokens": "integer"},
    ),
    Endpoint(
        "/v1/responses", "responses", streams=True, generates=True,
        fields={"input": "any", "instructions": "string", **_TUNED, "max_output_tokens": "integer"},
    ),
    Endpoint(
        "/v1/messages", "messages", streams=True, generates=True, dialect=ANTHROPIC,
        fields={"system": "any", **_SAID, **_TUNED, "max_tokens": "integer"},
    ),
    Endpoint("/v1/messages/count_tokens", dialect=ANTHROPIC, fields={"system": "any", **_SAID}),
    Endpoint("/v1/chat/completions/batch", generates=True, fields={"messages": "array"}),
    Endpoint("/cohere/v2/chat", streams=True, generates=True, fields={**_SAID, "stream": "boolean"}),
    Endpoint(
        "/inference/v1/generate", streams=True, generates=True,
        fields={"token_ids": "array", "sampling_params": "object", "stream": "boolean"},
    ),
    Endpoint("/generative_scoring", generates=True, fields={"query": "any", "items": "array"}),
    Endpoint("/v1/embeddings", fields={"input": "any", "encoding_format": "string", "dimensions": "integer"}),
    Endpoint("/v2/embed", fields={"texts": "array", "input_type": "string"}),
    Endpoint("/pooling", fields={"input": "any"}),
    Endpoint("/classify", fields={"input": "any"}),
    Endpoint("/score", fields=_PAIRS),
    Endpoint("/v1/score", fields=_PAIRS),
    Endpoint("/rerank", fields=_SCORED),
    Endpoint("/v1/rerank", fields=_SCORED),
    Endpoint("/v2/rerank", fields=_SCORED),
    Endpoint("/tokenize", fields={"prompt": "string", **_SAID}),
    Endpoint("/detokenize", fields={"tokens": "array"}),
    Endpoint(
        "/v1/audio/transcriptions", body="multipart", streams=True, retriable=False, generates=True,
        fields=_HEARD,
    ),
    Endpoint(
        "/v1/audio/translations", body="multipart", streams=True, retriable=False, generates=True,
        fields=_HEARD,
    ),
)  # fmt: skip

ENDPOINTS: Mapping[str, Endpoint] = {endpoint.path: endpoint for endpoint in _ENDPOINTS}

# Any other POST below /v1.  Nobody knows what it does, so it is tried once and counted as generating.
OTHER = Endpoint("/v1/*", streams=True, retriable=False, generates=True)

# vLLM's own controls below /v1.  Everything else it has for its operators lies outside of /v1.
_CONTROLS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# No dots, escapes or empty segments: what a worker (or a URL library) resolves to another path stays here.
_PLAIN = re.compile(r"/v1(?:/[A-Za-z0-9_-]{1,64}){1,6}")
_OURS = ("/v1/models", "/v1/responses/")  # answered here


def other(path: str) -> Endpoint | None:
    """How to relay a POST to a path that is in no table; None: not at all."""
    ours = path.startswith(_OURS) and path != "/v1/responses/render"
    return OTHER if _PLAIN.fullmatch(path) and path not in _CONTROLS and not ours else None


def known(path: str) -> bool:
    """Whether there is such a path, for another method."""
    return path in ENDPOINTS or path.startswith("/v1/models")
