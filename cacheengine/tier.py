"""The law of a tier.

A tier keeps frames under references and knows nothing of other tiers, of models, or of eviction.
Verbs are synchronous and batched: one round trip for forty chunks is the whole game, and one place (the
mover's threads) decides concurrency.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cacheengine.keys import ChunkKey

KEYED = -1  # the slot of a reference in a tier that is addressed by key alone


class Ref(NamedTuple):
    """A chunk's place in a tier: its key, and its slot where the tier is an arena of slots.

    `parent` and `root` (the key before this one, and the prompt's first chunk key) matter to write()
    only: they are stored with the payload, so that a map can be rebuilt prefix-closed from what is stored.
    """

    key: ChunkKey
    slot: int = KEYED
    parent: bytes = b""
    root: bytes = b""


class Tier(Protocol):
    """REQUIRES of every caller: each buffer is exactly `payload_bytes` long and 4,096-byte aligned, and
    nobody else writes to it during the call."""

    name: str

    def prefix(self, refs: Sequence[Ref]) -> int:
        """How many leading refs are here.  Reads no payload, changes nothing.  Raises TierDown."""

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        """Fill `into` from the front with verified payloads; return how many were filled.

        May be fewer than prefix() promised: the world moves.  Bytes that fail verification end the
        prefix, are counted and dropped.  Raises TierDown.
        """

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        """Keep payloads; return how many leading ones are safely kept.  Rewriting a key is a no-op or an
        overwrite with equal bytes.  A full or failing medium keeps fewer.  Raises TierDown."""

    def close(self) -> None:
        """Release files and sockets.  Idempotent."""


class NullTier:
    """Holds nothing.  The system must be correct, merely slower, with only this."""

    name = "null"

    def prefix(self, refs: Sequence[Ref]) -> int:
        return 0

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        return 0

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        return 0

    def close(self) -> None:
        return None
