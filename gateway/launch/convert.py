"""Run as a program: unpack a GGUF file into a model directory that vLLM can load.

The only module of the gateway side that loads torch; it is never imported, always a process of its own:
`python -m gateway.launch.convert <file.gguf> <directory>`.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, target: Path) -> None:
    """Weights as bf16 safetensors, tokenizer and chat template beside them."""
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # the weights are unpacked now: what is saved must not claim to be quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__["hf_quantizer"] = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
