"""What vLLM 0.32 makes of a body of /v1/messages or /v1/responses: the chat it renders.

Both are turned into an Ask and keyed like any chat.  What is converted here is converted exactly; whatever
else (images, server-side history, prompts that a setting of the worker reshapes) raises Unkeyable.
tests/engine/test_sdks.py compares with a real worker.
"""

from collections.abc import Iterator
from typing import Any

from gateway.ask import Ask, Asked, first_text
from gateway.errors import BadRequest
from gateway.template import BILLING_HEADER, Unkeyable

Body = dict[str, Any]


class Messages(Asked, frozen=True):
    """Anthropic's body (API reference, "Create a Message") with vLLM's own fields."""

    system: Any = None
    messages: Any = None
    tools: Any = None
    thinking: Any = None
    output_config: Any = None
    metadata: Any = None
    chat_template_kwargs: Any = None
    kv_transfer_params: Any = None

    @property
    def session(self) -> bytes:
        """`metadata.user_id` is Anthropic's name for what OpenAI calls `user`."""
        return first_text(self.metadata.get("user_id") if isinstance(self.metadata, dict) else None)

    def chat(self) -> Ask:
        """Raises Unkeyable."""
        thinking = _object(self.thinking or {}).get("type")
        if thinking == "disabled":
            raise Unkeyable("thinking")  # the worker's setting decides what that means
        said = [*_system(self.system)]
        for message in _list(self.messages):
            said += _anthropic_turn(_object(message))
        return Ask(
            messages=said,
            tools=None if self.tools is None else [*map(_anthropic_tool, _list(self.tools))],
            reasoning_effort=_object(self.output_config or {}).get("effort"),
            chat_template_kwargs=self.chat_template_kwargs,
            kv_transfer_params=self.kv_transfer_params,
            cache_salt=self.cache_salt,
        )


class Responses(Asked, frozen=True):
    """OpenAI's body (API reference, "Create a model response") with vLLM's own fields."""

    input: Any = None
    instructions: Any = None
    tools: Any = None
    reasoning: Any = None
    truncation: Any = "disabled"
    background: Any = None
    previous_response_id: Any = None
    previous_input_messages: Any = None
    chat_template_kwargs: Any = None
    kv_transfer_params: Any = None

    def check(self) -> None:
        """Raises BadRequest for what only the one worker that answered before could know."""
        if self.previous_response_id is not None:
            raise BadRequest(
                "Responses are not kept here: send the conversation in `input` instead of "
                "`previous_response_id`.",
                "previous_response_id",
            )
        if self.background:
            raise BadRequest("Responses are not kept here: send `background: false`.", "background")

    def chat(self) -> Ask:
        """Raises Unkeyable."""
        if self.truncation != "disabled" or self.previous_input_messages is not None:
            raise Unkeyable("request")
        said: list[Body] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        start = len(said)
        for item in _list(items):
            _add_item(said, start, _object(item))
        if items and items[-1].get("status") in ("in_progress", "incomplete"):
            raise Unkeyable("request")  # to be continued: only in some shapes
        return Ask(
            messages=said,
            tools=[*map(_responses_tool, _list(self.tools))] if self.tools else None,
            reasoning_effort=_object(self.reasoning or {}).get("effort"),
            chat_template_kwargs=self.chat_template_kwargs,
            kv_transfer_params=self.kv_transfer_params,
            cache_salt=self.cache_salt,
            add_special_tokens=True,  # vLLM's chats of this path have them, those of the others do not
        )


# -- Anthropic ----------------------------------------------------------------------------------------------


def _system(system: Any) -> Iterator[Body]:
    texts = [system] if isinstance(system, str) else []
    if isinstance(system, list):
        blocks = (_object(block) for block in system)
        texts = [block.get("text") or "" for block in blocks if block.get("type") == "text"]
        texts = [text for text in texts if not text.startswith(BILLING_HEADER)]
    text = "".join(texts)
    if text:
        yield {"role": "system", "content": text}


def _anthropic_turn(message: Body) -> Iterator[Body]:
    """One message; the results of tools in it are messages before it."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise Unkeyable("messages")  # a later system message is moved, where the worker's template wants it
    turn: Body = {"role": role}
    if isinstance(content, str):
        yield {**turn, "content": content}
        return
    texts: list[Body] = []
    thoughts: list[str] = []
    calls: list[Body] = []
    for block in map(_object, _list(content)):
        kind = block.get("type")
        if kind == "text":
            texts += [{"type": "text", "text": block["text"]}] if block.get("text") else []
        elif kind == "thinking":
            thoughts += [block["thinking"]] if block.get("thinking") is not None else []
        elif kind == "tool_use" and block.get("id"):
            function = {"name": block.get("name") or "", "arguments": block.get("input") or {}}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id") or "",
                "content": _result(block.get("content")),
            }
        elif kind != "redacted_thinking":
            raise Unkeyable("multimodal")
    if thoughts:
        turn["reasoning"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    if texts:
        turn["content"] = texts[0]["text"] if len(texts) == 1 else texts
    if role != "user" or texts:
        yield turn


def _result(content: Any) -> str:
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    parts = [*map(_object, content)]
    if any(part.get("type") != "text" for part in parts):
        raise Unkeyable("multimodal")
    return "\n".join(part.get("text", "") for part in parts)


def _anthropic_tool(tool: Any) -> Body:
    schema = _object(_object(tool).get("input_schema"))
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        "strict": tool.get("strict"),
        "defer_loading": tool.get("defer_loading"),
    }
    return {"type": "function", "function": function}


# -- Responses ----------------------------------------------------------------------------------------------


def _add_item(said: list[Body], start: int, item: Body) -> None:
    """One item to the conversation; an assistant's turn may come in several.  `start`: the first that did."""
    kind, role = item.get("type", "message"), item.get("role")
    last = said[-1] if len(said) > start and said[-1]["role"] == "assistant" else None
    if kind == "message" and role in ("system", "user"):
        said.append({"role": role, "content": _texts(item.get("content"), "input_text")})
    elif kind == "message" and role == "assistant":
        content = item.get("content")
        parts = content if isinstance(content, str) else _texts(content, "output_text")
        text = parts if isinstance(parts, str) else parts[0]["text"]  # vLLM reads the first part only
        if last is not None and "content" not in last:
            last["content"] = text
        else:
            said.append({"role": role, "content": text})
    elif kind == "function_call" and not item.get("namespace"):
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "function": function, "type": "function"}
        if last is not None:
            last.setdefault("tool_calls", []).append(call)
        else:
            said.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "function_call_output" and isinstance(item.get("output"), str):
        said.append({"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]})
    else:
        raise Unkeyable("multimodal")  # pictures, reasoning, tools that run on the server


def _texts(content: Any, kind: str) -> Any:
    if isinstance(content, str):
        return content
    parts = [*map(_object, _list(content))]
    if not parts or any(part.get("type") != kind or not isinstance(part.get("text"), str) for part in parts):
        raise Unkeyable("multimodal")
    return [{"type": kind, "text": part["text"]} for part in parts]


def _responses_tool(tool: Any) -> Body:
    if _object(tool).get("type") != "function":
        raise Unkeyable("tools")  # what runs on the server is described by the server
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


# -- both ----------------------------------------------------------------------------------------------


def _object(value: Any) -> Body:
    if not isinstance(value, dict):
        raise Unkeyable("messages")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Unkeyable("messages")
    return value
