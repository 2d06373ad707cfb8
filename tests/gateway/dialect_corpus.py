"""Bodies of /v1/messages and /v1/responses whose tokens the gateway must foretell exactly."""

from typing import Any

Body = dict[str, Any]

_SCHEMA = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
_USER: Body = {"role": "user", "content": "weather in Oslo?"}


def _text(text: str) -> Body:
    return {"type": "text", "text": text}


def _in(text: str) -> Body:
    return {"type": "input_text", "text": text}


MESSAGES: list[Body] = [
    {"messages": [_USER]},
    {"system": "You are terse.", "messages": [_USER]},
    {"system": [_text("a"), _text("x-anthropic-billing-header: cch=1"), _text("b")], "messages": [_USER]},
    {
        "messages": [
            _USER,
            {"role": "assistant", "content": "rain"},
            {"role": "user", "content": "and 世界? 🙂"},
        ]
    },
    {"messages": [{"role": "user", "content": [_text("one"), _text("two")]}]},
    {"messages": [{"role": "user", "content": [_text("")]}, _USER]},
    {"messages": [_USER], "thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000},
    {"messages": [_USER], "output_config": {"effort": "low"}},
    {"messages": [_USER], "chat_template_kwargs": {"x": 1}},
    {
        "tools": [{"name": "weather", "description": "of a city", "input_schema": _SCHEMA}],
        "messages": [
            _USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    _text("let me look"),
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [_text("rain"), _text("5 °C")]},
                    _text("so?"),
                ],
            },
        ],
    },
]

RESPONSES: list[Body] = [
    {"input": "weather in Oslo?"},
    {"instructions": "You are terse.", "input": "hi"},
    {"input": [_USER, {"role": "assistant", "content": "rain"}, {"role": "user", "content": "and 世界? 🙂"}]},
    {"input": [{"type": "message", "role": "user", "content": [_in("one"), _in("two")]}]},
    {"input": [{"role": "system", "content": "s"}, _USER], "instructions": "i"},
    {"input": [_USER], "reasoning": {"effort": "low"}},
    {
        "input": [
            _USER,
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "rain"}]},
            {"role": "user", "content": "so?"},
        ]
    },
    {
        "tools": [{"type": "function", "name": "weather", "parameters": _SCHEMA, "strict": True}],
        "input": [
            _USER,
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"role": "user", "content": "so?"},
        ],
    },
]
