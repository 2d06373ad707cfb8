"""A llama of four layers and random weights, for what is about the engine and not about language.

Even heads, so that it can be split over two ranks (the bundled model has three KV heads).  Seeded, so that
equal folders hold equal weights; spread wide enough that every answer depends on the whole prompt; and with
layers wide enough that loading a chunk is always quicker than computing it.
Run as a script in a process of its own:  python tiny.py <folder with a tokenizer> <folder to make>
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make(tokenizer_of: Path, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
        initializer_range=0.1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in tokenizer_of.glob("tokenizer*.json"):
        shutil.copy(path, folder / path.name)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
