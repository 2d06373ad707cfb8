"""The few fields the gateway reads of a body.

The body itself travels on as the bytes that came; whatever is not read here is the worker's business, and so
is validation: a field of a type we do not expect makes a prompt we do not key, not an error.
"""

from typing import Any, TypeVar

import msgspec

from gateway.errors import BadRequest


class Asked(msgspec.Struct, frozen=True):
    """What every body may have.  `Any` is what vLLM validates, not us."""

    model: str | None = None
    stream: Any = None
    cache_salt: Any = None
    prompt_cache_key: Any = None
    user: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None

    @property
    def session(self) -> bytes:
        """The caller's own name for the conversation, as OpenAI has it: `prompt_cache_key`, else `user`."""
        return first_text(self.prompt_cache_key, self.user)

    def chat(self) -> "Ask":
        """The chat or completion that the worker makes of it.  Raises Unkeyable."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises BadRequest for what this gateway cannot serve, whoever the worker."""


class Ask(Asked, frozen=True):
    """What decides the tokens of a chat or a completion."""

    messages: Any = None
    prompt: Any = None
    tools: Any = None
    documents: Any = None
    add_generation_prompt: Any = True
    continue_final_message: Any = False
    add_special_tokens: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    reasoning_effort: Any = None
    truncate_prompt_tokens: Any = None
    prompt_embeds: Any = None
    kv_transfer_params: Any = None
    prompt_logprobs: Any = None
    echo: Any = None
    logprobs: Any = None

    def chat(self) -> "Ask":
        return self

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """Key tags: prompts under different salts never share KV."""
        return (("salt", self.salt),) if self.salt else ()

    @property
    def salt(self) -> str:
        """The part of the cache this prompt may share; "" for everybody's."""
        return self.cache_salt if isinstance(self.cache_salt, str) else ""

    @property
    def keyable(self) -> bool:
        """False when something beyond chat template and tokenizer shapes the prompt, or no cache may be read
        for it: what is asked about every prompt token has to be computed for every prompt token."""
        return (
            self.prompt_logprobs is None
            and not (self.echo and self.logprobs is not None)
            and self.chat_template is None
            and self.truncate_prompt_tokens is None
            and self.prompt_embeds is None
            and not (
                isinstance(self.kv_transfer_params, dict) and "prompt_token_ids" in self.kv_transfer_params
            )
        )


A = TypeVar("A", bound=Asked)

_ask = msgspec.json.Decoder(Ask)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def first_text(*names: Any) -> bytes:
    """The first of them that is a string and says something."""
    return next((name for name in names if isinstance(name, str) and name), "").encode()


def read_ask(body: bytes) -> Ask:
    """Raises BadRequest as read() does."""
    return read(_ask, body)


def read(decoder: msgspec.json.Decoder[A], body: bytes) -> A:
    """Raises BadRequest when the body is not a JSON object, or its model is not a string."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise BadRequest(
            f"The request body is not acceptable: {exc}.", "model" if "$.model" in str(exc) else None
        ) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"The request body is not valid JSON: {exc}.") from exc


def renamed(body: bytes, model: str) -> bytes:
    """The same request for another model.  Raises BadRequest as spliced() does."""
    return spliced(body, model=model)


def spliced(body: bytes, **members: str) -> bytes:
    """The same request with other `members`: every other one keeps its bytes.  Raises BadRequest for names of
    members that read_ask() had no need to read."""
    try:
        held = _members.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"The request body is not valid JSON: {exc}.") from exc
    held |= {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in members.items()}
    return msgspec.json.encode(held)
