"""A model folder to token ids of requests: what vLLM's /tokenize would say, without torch or transformers.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from gateway.ask import Ask
from gateway.encoders import Encoder, load_encoder
from gateway.template import ChatTemplate, Unkeyable

_NAMED_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokens(NamedTuple):
    """The longest prompt of a request (what is keyed), and the length of all of them together."""

    ids: list[int]
    total: int


class ModelTokenizer:
    """Chat template and encoder of one model.  Thread-safe."""

    def __init__(self, encoder: Encoder, templates: Mapping[str, ChatTemplate], note: str = "") -> None:
        """`templates` by name: "default", and "tool_use" where a model has a second one."""
        self.encoder = encoder
        self.note = note  # why tiktoken is not used; empty when it is
        self.templates = dict(templates)

    @classmethod
    def load(cls, folder: Path, memo_bytes: int = 64 << 20) -> "ModelTokenizer":
        """Raises OSError or ValueError when the folder does not hold a tokenizer we can read."""
        encoder, note = load_encoder(folder / "tokenizer.json", memo_bytes)
        config = _json(folder / "tokenizer_config.json")
        special = _special_tokens(_json(folder / "special_tokens_map.json") | config)
        try:
            templates = {
                name: ChatTemplate(text, special) for name, text in _templates(folder, config).items()
            }
        except jinja2.TemplateSyntaxError as exc:
            raise ValueError(f"the chat template in {folder} does not parse: {exc}") from exc
        return cls(encoder, templates, note)

    def chat(self, ask: Ask) -> Tokens:
        """Raises Unkeyable."""
        wanted = "tool_use" if ask.tools is not None and "tool_use" in self.templates else "default"
        template = self.templates.get(wanted)
        if template is None:
            raise Unkeyable("no_template")
        if ask.chat_template_kwargs is not None and not isinstance(ask.chat_template_kwargs, dict):
            raise Unkeyable("template")
        ids = self.encoder.encode(template.render(ask), bool(ask.add_special_tokens), ask.salt)
        return Tokens(ids, len(ids))

    def completion(self, ask: Ask) -> Tokens:
        """Raises Unkeyable."""
        special = ask.add_special_tokens is None or bool(ask.add_special_tokens)
        several = isinstance(ask.prompt, list) and set(map(type, ask.prompt)) != {int}
        prompts = ask.prompt if several else [ask.prompt]
        found = [self._prompt(prompt, special, ask.salt) for prompt in prompts]
        return Tokens(max(found, key=len, default=[]), sum(map(len, found)))

    def _prompt(self, prompt: Any, special: bool, whose: str) -> list[int]:
        if isinstance(prompt, str):
            return self.encoder.encode(prompt, special, whose)
        ids = isinstance(prompt, list) and set(map(type, prompt)) <= {int}
        if ids and min(prompt, default=0) >= 0 and max(prompt, default=0) < 1 << 32:
            return list(prompt)
        raise Unkeyable("prompt")

    def tokens(self, ask: Ask, chat: bool) -> Tokens:
        """Token ids of a request to chat/completions (`chat`) or completions.  Raises Unkeyable."""
        if not ask.keyable:
            raise Unkeyable("request")
        try:
            return self.chat(ask) if chat else self.completion(ask)
        except (UnicodeError, TypeError) as exc:  # a lone surrogate, out of a tool call's nested JSON
            raise Unkeyable("text") from exc


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token … as templates see them; an entry may be a string or an AddedToken object."""
    out = {}
    for name in (f"{short}_token" for short in _NAMED_SPECIAL):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            out[name] = text
    return out


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over the ones inside tokenizer_config.json, as in transformers."""
    inside = config.get("chat_template")
    out: dict[str, str] = {}
    if isinstance(inside, str):
        out["default"] = inside
    elif isinstance(inside, list):
        out |= {entry["name"]: entry["template"] for entry in inside}
    if (file := folder / "chat_template.jinja").is_file():
        out["default"] = file.read_text(encoding="utf-8")
    for file in (folder / "additional_chat_templates").glob("*.jinja"):
        out[file.stem] = file.read_text(encoding="utf-8")
    return out
