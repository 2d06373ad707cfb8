"""Run as a program: what vLLM's request classes, message parser and template renderer make of some requests.

stdin: {"folder": …, "cases": [{"template": source or null, "chat": bool, "body": …}]}; the last stdout line:
a JSON list of token ids, null where vLLM refuses.  The only part of these tests that imports vLLM.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.renderers import merge_kwargs
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import _detect_content_format, safe_apply_chat_template


def chat_ids(tokenizer: Any, template: str, body: dict[str, Any]) -> list[int]:
    request = ChatCompletionRequest.model_validate({"model": "m", **body})
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    params = request.build_chat_params(template, "auto").with_defaults(
        merge_kwargs(None, {"tools": tools, "tokenize": False})
    )
    model_config: Any = SimpleNamespace(multimodal_config=None, enable_prompt_embeds=False)
    conversation, _, _ = parse_chat_messages(
        request.messages, model_config, content_format=_detect_content_format(template, default="string")
    )
    text = safe_apply_chat_template(
        model_config, tokenizer, conversation, **params.get_apply_chat_template_kwargs()
    )
    return tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"]


def main() -> None:
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    answers: list[list[int] | None] = []
    for case in job["cases"]:
        try:
            if case["chat"]:
                template = case["template"] or tokenizer.chat_template
                answers.append(chat_ids(tokenizer, template, case["body"]))
            else:
                request = CompletionRequest.model_validate({"model": "m", **case["body"]})
                answers.append(
                    tokenizer(request.prompt, add_special_tokens=request.add_special_tokens)["input_ids"]
                )
        except Exception as exc:  # noqa: BLE001  a refusal, whatever its type
            print(case["body"], repr(exc)[:300], file=sys.stderr)
            answers.append(None)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
