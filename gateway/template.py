"""Chat messages to prompt text, as vLLM 0.32 does it for a Hugging Face tokenizer, without importing either.

Three steps, in vLLM's order: normalise the messages (content parts become strings or typed parts, whichever
the template can read; tool-call arguments become objects), merge the template's arguments, render in the
same sandboxed environment transformers uses.  Whatever is not understood raises Unkeyable: the request is
then routed without keys, and the worker says what it thinks of it.  tests/corpus.py holds the proof.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.ask import Ask

Message = dict[str, Any]
ContentFormat = Literal["string", "openai"]

_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
# Arguments of transformers' apply_chat_template that never reach the template itself.
_NOT_FOR_TEMPLATES = {
    "conversation", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
# What a template may die of: it is a program by the model's author, fed with the client's data.
_RENDER_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
BILLING_HEADER = "x-anthropic-billing-header"
_MARK = "CAIRN-CONTINUES-HERE "  # the space shows whether the template trims the last message


class Unkeyable(Exception):
    """This prompt's tokens cannot be foretold here.  `reason` is a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ChatTemplate:
    """One jinja template and the named special tokens it may print.  Thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        env = _environment()
        self._source = source
        self._special = dict(special_tokens)
        self._template = env.from_string(source)
        self.content_format = content_format(env.parse(source))
        self._knows_developer = '"developer"' in source or "'developer'" in source

    def render(self, ask: Ask) -> str:
        """The prompt text of a chat request.  Raises Unkeyable."""
        try:
            messages = conversation(ask.messages, self.content_format)
            if not self._knows_developer and any(m["role"] == "developer" for m in messages):
                messages = _without_developer(messages)
            return self._render(messages, _arguments(ask))
        except _RENDER_FAILURES as exc:
            raise Unkeyable("template") from exc

    def _render(self, messages: list[Message], kwargs: dict[str, Any]) -> str:
        continues = kwargs.pop("continue_final_message")
        if continues and kwargs["add_generation_prompt"]:
            raise Unkeyable("template")
        last = ""
        if continues:
            messages, last = _marked(messages, self._source)
        text = self._template.render(messages=messages, **{**self._special, **kwargs})
        return _cut(text, last) if continues else text


def _arguments(ask: Ask) -> dict[str, Any]:
    """The template's arguments: fields of the request win over chat_template_kwargs; None is not given."""
    given = ask.chat_template_kwargs or {}
    if given.keys() & {"chat_template", "tokenize"}:
        raise Unkeyable("template")
    fields = {
        "add_generation_prompt": bool(ask.add_generation_prompt),
        "continue_final_message": bool(ask.continue_final_message),
        "documents": ask.documents,
        "reasoning_effort": ask.reasoning_effort,
    }
    if ask.reasoning_effort is not None and "enable_thinking" not in given:
        fields["enable_thinking"] = ask.reasoning_effort != "none"
    kwargs = {"tools": None if ask.tools is None else [_tool(tool) for tool in ask.tools], "documents": None}
    kwargs |= {k: v for k, v in given.items() if k not in _NOT_FOR_TEMPLATES and v is not None}
    kwargs |= {k: v for k, v in fields.items() if v is not None and v != "auto"}
    return kwargs


def _tool(tool: Message) -> Message:
    """A tool as vLLM's request model dumps it: fixed order, absent description and parameters are None."""
    function, deferred = tool["function"], tool.get("defer_loading")
    out = {name: function.get(name) for name in ("name", "description", "parameters")}
    out |= {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
    if deferred is None:
        return {"type": "function", "function": out}
    return {
        "type": "function",
        "function": {**out, "defer_loading": out.get("defer_loading", deferred)},
        "defer_loading": deferred,
    }


def conversation(messages: Any, form: ContentFormat) -> list[Message]:
    """OpenAI messages as vLLM hands them to a template.  Raises Unkeyable for what is not text."""
    if not isinstance(messages, list) or not messages:
        raise Unkeyable("messages")
    return [_message(message, form) for message in messages]


def _message(message: Message, form: ContentFormat) -> Message:
    role = message["role"]
    texts = list(_texts(message.get("content"), strip=role == "system"))
    if form == "string":
        texts = [text for text in texts if text]  # vLLM drops empty strings, but keeps empty typed parts
    content: Any = (
        [{"type": "text", "text": text} for text in texts] if form == "openai" else "\n".join(texts)
    )
    out: Message = {"role": role, "content": content}
    if role == "assistant":
        if message.get("tool_calls"):
            out["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        if (reasoning := message.get("reasoning")) is not None:
            out["reasoning"] = out["reasoning_content"] = reasoning
    elif role == "tool":
        out["content"] = "\n".join(texts)
        if "tool_call_id" in message:
            out["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        out["tools"] = message.get("tools")
    for name in ("name", "task"):
        if isinstance(message.get(name), str):
            out[name] = message[name]
    return out


def _texts(content: Any, strip: bool) -> Iterator[str]:
    for part in [content] if isinstance(content, str) else content or []:
        text = part
        if isinstance(part, dict):
            field = _TEXT_FIELDS.get(part.get("type", ""))
            text = part.get(field) if field else None
            if field and text is None:
                continue  # vLLM skips empty parts
        if not isinstance(text, str):
            raise Unkeyable("multimodal")
        if strip and text.startswith(BILLING_HEADER):
            text = text.partition("\n")[2]
            if not text:
                continue
        yield text


def _tool_call(call: Message) -> Message:
    """Templates expect arguments as an object; anything that is not one becomes {}."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}


def _without_developer(messages: list[Message]) -> list[Message]:
    """For templates that do not know the role: developer speaks as system, and system speaks once, first."""
    said = [
        {k: v for k, v in m.items() if k != "tools"} | {"role": "system"} if m["role"] == "developer" else m
        for m in messages
    ]
    systems = [m for m in said if m["role"] == "system"]
    if len(systems) == 1 and said[0]["role"] == "system":
        return said
    contents = []
    for m in systems:
        content = m["content"]
        contents.append(content if isinstance(content, str) else "\n".join(part["text"] for part in content))
    merged: Message = {"role": "system", "content": "\n\n".join(filter(None, contents))}
    return [merged, *(m for m in said if m["role"] != "system")]


def _marked(messages: list[Message], source: str) -> tuple[list[Message], str]:
    """continue_final_message: end the last message with a mark, to find where its text ends when rendered."""
    final = copy.deepcopy(messages[-1])
    content = final["content"]
    if "content" not in source or (isinstance(content, list) and not content):
        raise Unkeyable("template")
    if isinstance(content, str):
        last, final["content"] = content, content + _MARK
    else:
        last = content[-1]["text"]
        content[-1]["text"] = last + _MARK
    return [*messages[:-1], final], last


def _cut(text: str, last: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or last.strip() not in text:
        raise Unkeyable("template")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks words for training; here it just prints them."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# -- does the template read content as a string, or does it loop over parts?  (vLLM's rule, on jinja's tree)


def content_format(tree: nodes.Template) -> ContentFormat:
    """'openai' when some loop runs over a message's content, else 'string'."""
    try:
        return "openai" if _loops_over_content(tree) else "string"
    except _Unclear:
        return "string"


class _Unclear(Exception):
    """A target that is not a plain name: nobody follows those, so neither do we."""


def _loops_over_content(tree: nodes.Template) -> bool:
    lists = _aliases(tree, "messages")
    items = {
        _name(loop.target) for loop in tree.find_all(nodes.For) if any(_reads(loop.iter, n) for n in lists)
    }

    def is_content(node: nodes.Node) -> bool:
        return any(_reads(node, item, "content") for item in items)

    params: dict[int, set[str]] = {}  # loop inside a macro -> the macro's parameters that are given content
    for macro in tree.find_all(nodes.Macro):
        given = set(_content_params(tree, macro, is_content))
        for loop in macro.find_all(nodes.For):
            # a macro nested in one that takes content keeps the outer one's parameters, as in vLLM
            params[id(loop)] = given or params.get(id(loop), set())
    for loop in tree.find_all(nodes.For):
        named = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        inside = params.get(id(loop))
        if is_content(loop.iter) or (named == "content" if inside is None else named in inside):
            _name(loop.target)
            return True
    return False


def _content_params(tree: nodes.Template, macro: nodes.Macro, is_content: Any) -> Iterator[str]:
    names = [arg.name for arg in macro.args]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            yield from (name for name, arg in zip(names, call.args, strict=False) if is_content(arg))
            yield from (kw.key for kw in call.kwargs if kw.key in names and is_content(kw.value))


def _aliases(tree: nodes.Template, name: str) -> list[str]:
    """`name` and every variable set from it, directly or through others."""
    found = [name]
    for known in found:  # grows while it runs
        for assign in tree.find_all(nodes.Assign):
            if _reads(assign.node, known) and (alias := _name(assign.target)) not in found:
                found.append(alias)
    return found


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _Unclear
    return target.name


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Is this `name` (or `name.key`), possibly through filters, tests and slices?"""
    if isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        return _reads(node.node, name, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == key and _reads_name(node.node, name)
    return isinstance(node, nodes.Getattr) and node.attr == key and _reads_name(node.node, name)


def _reads_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
