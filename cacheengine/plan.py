"""What crosses from the scheduler to the ranks and back: frozen, small, loggable data in slot numbers.

Slot 7 is slot 7 in every rank's arena and disk file, so one Plan serves all tensor-parallel ranks.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from cacheengine.keys import ChunkKey

NO_PARENT = ChunkKey(bytes(16))  # the parent of a prompt's first chunk
SKIP = -1  # a block the device already holds: move the others, leave this one alone
HOST, DISK, REDIS = "host", "disk", "redis"
GONE = "gone"  # the chunk left between lookup and load: a miss, reported like any failed read


class Want(NamedTuple):
    """One chunk a caller wants to load or save, with the device blocks it lives in.

    `size` is its length in blocks: a full chunk, or fewer for a prompt's ragged tail.  `tenant` is whose
    quota it counts against (the prompt's cache_salt)."""

    key: ChunkKey
    parent: ChunkKey  # NO_PARENT for the first chunk of a prompt
    root: ChunkKey
    size: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""


class Move(NamedTuple):
    """One chunk between its host slot and the paged blocks (none in a demote plan), by way of `slot` of
    `tier` where it comes from below or goes there."""

    key: ChunkKey
    parent: ChunkKey
    root: ChunkKey
    size: int  # blocks
    host: int
    blocks: tuple[int, ...] = ()
    tier: str = HOST
    slot: int = -1


Kind = Literal["load", "save", "demote"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A list of moves: tiers → blocks, blocks → host, or host → one lower tier.  Every plan is reported
    back, also after an error: a lost one would leak blocks."""

    id: int
    kind: Kind
    moves: tuple[Move, ...]
    req_id: str = ""  # "" where no request waits for it


class Report(NamedTuple):
    """A rank's word on a plan: how many of its leading chunks are truly where they should be."""

    plan: int
    kept: int


Op = Literal["read", "write", "gather", "scatter"]


class Timing(NamedTuple):
    """One measured transfer, for the rates the planner and the router use."""

    tier: str
    op: Op
    bytes: int
    seconds: float
