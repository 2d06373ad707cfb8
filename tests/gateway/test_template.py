import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.ask import read_ask
from gateway.template import ChatTemplate, Unkeyable
from gateway.tokenize import ModelTokenizer
from tests.corpus import CHATS, COMPLETIONS, TEMPLATE_CHATS, TEMPLATES


def cases() -> list[dict[str, Any]]:
    own = [{"template": None, "chat": True, "body": body} for body in CHATS]
    raw = [{"template": None, "chat": False, "body": body} for body in COMPLETIONS]
    other = [
        {"template": source, "chat": True, "body": body}
        for source in TEMPLATES.values()
        for body in TEMPLATE_CHATS
    ]
    return own + raw + other


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_token_ids_are_what_vllm_makes_of_the_same_request(
    smollm_path: Path, reference: list[list[int] | None], plain: bool
) -> None:
    folder = json.loads((smollm_path / "tokenizer_config.json").read_text())
    special = {name: folder[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    own = ModelTokenizer.load(smollm_path)
    encoder = own.encoder.plain if plain else own.encoder
    wrong = []
    for case, expected in zip(cases(), reference, strict=True):
        templates = own.templates
        if case["template"]:
            templates = {"default": ChatTemplate(case["template"], special)}
        model = ModelTokenizer(encoder, templates)
        try:
            found = model.tokens(read_ask(json.dumps(case["body"]).encode()), case["chat"]).ids
        except Unkeyable:
            found = None
        if found != expected:
            wrong.append((case, found, expected))
    assert not wrong
    assert sum(ids is not None for ids in reference) > 150


@pytest.fixture(scope="module")
def reference(smollm_path: Path) -> list[list[int] | None]:
    script = Path(__file__).with_name("reference.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps({"folder": str(smollm_path), "cases": cases()}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No module named" in done.stderr:
        pytest.skip(f"NO REFERENCE: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
