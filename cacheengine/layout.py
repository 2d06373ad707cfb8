"""What a chunk's bytes mean in one worker: geometry, and the facts that go into its namespace."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cacheengine.errors import LayoutMismatch
from cacheengine.keys import KeyScheme, namespace_of

_EDGE_BYTES = 64 << 10


@dataclass(frozen=True)
class KVLayout:
    """Pages are opaque bytes: this engine never looks inside one (vLLM's CPU backend stores K dim-major)."""

    layers: int
    block_tokens: int
    block_bytes: int  # one block of one layer, one rank
    chunk_tokens: int
    dtype: str
    name: str  # vLLM's layout name and the attention ISA, e.g. "LBHNC/amx"
    facts: Mapping[str, object]

    def __post_init__(self) -> None:
        if self.chunk_tokens % self.block_tokens:
            raise LayoutMismatch(
                f"chunk_tokens={self.chunk_tokens} is not a multiple of vLLM's block size "
                f"{self.block_tokens}; set chunk_tokens to a multiple of it"
            )

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_tokens // self.block_tokens

    @property
    def payload_bytes(self) -> int:
        """Bytes of one chunk in one rank."""
        return self.layers * self.blocks_per_chunk * self.block_bytes

    @property
    def scheme(self) -> KeyScheme:
        geometry = {
            "layers": self.layers,
            "block_tokens": self.block_tokens,
            "block_bytes": self.block_bytes,
            "chunk_tokens": self.chunk_tokens,
            "dtype": self.dtype,
            "layout": self.name,
        }
        return KeyScheme(namespace_of({**self.facts, **geometry}), self.chunk_tokens)


def weights_fingerprint(model: str, revision: str | None) -> str:
    """Names the weights, not where they lie: two workers with equal files at different paths share a cache.

    A local folder: SHA-256 over its config, and name, size, head and tail of every weight file (64 KiB
    each: a safetensors head holds all shapes and offsets).  Anything else: the hub id and its revision.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    h = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        h.update(config.read_bytes())
    weights = sorted(p for ext in ("safetensors", "bin", "pt", "gguf") for p in folder.glob(f"*.{ext}"))
    for path in weights:
        size = path.stat().st_size
        h.update(f"{path.name}:{size}".encode())
        with path.open("rb") as f:
            h.update(f.read(_EDGE_BYTES))
            f.seek(max(0, size - _EDGE_BYTES))
            h.update(f.read(_EDGE_BYTES))
    return h.hexdigest()
