"""What a chunk's bytes mean in one worker: geometry, and the facts that go into its namespace."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_128

from cacheengine.errors import LayoutMismatch
from cacheengine.keys import KeyScheme, namespace_of

_PIECE_BYTES = 8 << 20


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
    heads: int = 0  # of K and of V in one rank's page; 0 where a page is not K and V of equal width

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


def weights_fingerprint(model: str, commit: str | None) -> str:
    """Names the weights, not where they lie: two workers with equal files at different paths share a cache.

    A local folder: XXH3-128 over name, size and every byte of its config and weight files (10 GB/s from the
    page cache; it guards against accidents, not against whoever may write to the folder).  A hub id: its
    commit.  Raises LayoutMismatch where neither is known: a branch name does not prove what it points to.
    """
    folder = Path(model)
    if not folder.is_dir():
        if not commit:
            raise LayoutMismatch(f"nothing proves which weights {model!r} is; serve it from a local folder")
        return f"{model}@{commit}"
    h = xxh3_128()
    names = ("config.json", "*.safetensors", "*.bin", "*.pt", "*.gguf")
    for path in sorted(path for name in names for path in folder.glob(name)):
        h.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with path.open("rb") as f:
            while piece := f.read(_PIECE_BYTES):
                h.update(piece)
    return h.hexdigest()
