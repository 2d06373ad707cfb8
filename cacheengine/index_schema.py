"""The words of the chunk index: names of keys in Redis, tier bits, what a worker says about itself.

The index is the one loop of the system, closed through data in Redis, never through a call: workers publish
who holds which chunk (index_writer), gateways ask (index_reader).  It is a hint: a stale yes costs one
recompute, never a wrong answer.

    cairn:fleet                      ZSET    member <ns>:<worker_id>, score = server ms of the last beat
    cairn:<ns>:worker:<worker_id>    HASH    the lease: WorkerInfo and heartbeat, all strings; expires
    cairn:<ns>:epoch:<worker_id>     STRING  last epoch given to that name
    cairn:<ns>:mark:{<n>}:<worker_id>  STRING  number of that worker's last batch on this server; expires
    cairn:<ns>:{<root8>}:<key>       HASH    field <worker_id>@<epoch>, value = decimal tier bitmap; expires

`ns` is 32 hex digits, `root8` the first 16 hex digits of the prompt's first chunk key: one prefix family
shares a Cluster slot, families spread.  `key` is 16 raw bytes: scripts then name a chunk without making
digits of it, a fifth of a look-up's time.  A death or restart is O(1): entries carry the worker's epoch, so
when the lease expires or the epoch rises they are invisible at once; they are swept later.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from cacheengine.config import ConfigError
from cacheengine.keys import ChunkKey, Namespace

DEVICE, HOST, DISK, SHARED = 1, 2, 4, 8  # the tier bitmap

FLEET = "cairn:fleet"
WRONG_TYPE = "WRONGTYPE"  # how Redis begins to refuse a key that holds something else: one key's trouble
SEPARATOR = "@"  # between worker id and epoch in a field
# a host name, a port, a path-like suffix; no separator, no braces (Cluster hash tags), no blanks
_WORKER_ID = re.compile(r"[A-Za-z0-9._:/\-\[\]]{1,128}")


class Entry(NamedTuple):
    """One fact to publish: where this worker holds a chunk now.  `bits` 0: nowhere any more."""

    root: ChunkKey  # first chunk key of the prompt
    key: ChunkKey
    bits: int


class Depths(NamedTuple):
    """For each tier, how many chunks from the front one holder can serve from it *or a faster one*:
    the deepest chunk that lies in that tier.  Holdings are prefix-closed over the union of tiers, so chunks
    `device..host-1` come from host, `max(device, host)..disk-1` from disk."""

    device: int = 0
    host: int = 0
    disk: int = 0
    shared: int = 0

    @property
    def local(self) -> int:
        """Leading chunks this holder has itself, in any tier of its own."""
        return max(self.device, self.host, self.disk)


NOTHING = Depths()


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says about itself once.  Raises ConfigError for a worker id Redis names cannot carry."""

    worker_id: str
    url: str  # base URL under which a gateway reaches it
    model: str  # served name
    model_path: str  # where its tokenizer and chat template are
    namespace: str  # hex
    chunk_tokens: int
    probe_keys: tuple[str, ...] = ()  # handshake: hex keys of keys.PROBE_TOKENS
    block_size: int = 0  # tokens in one of vLLM's blocks
    world_size: int = 1
    payload_bytes: int = 0  # bytes of one chunk, summed over the ranks
    tiers: tuple[str, ...] = ()  # names, fastest first
    boot_id: str = ""  # differs for every process that ever took this worker id
    epoch: int = 0  # given by the index; rises at each start

    def __post_init__(self) -> None:
        if not _WORKER_ID.fullmatch(self.worker_id):
            raise ConfigError(
                f"worker_id {self.worker_id!r} must be 1 to 128 letters, digits or any of ._:/-[]"
            )

    def fields(self) -> dict[str, str]:
        """As the lease's HASH holds it."""
        return {
            name: ",".join(value) if isinstance(value := getattr(self, name), tuple) else str(value)
            for name in _INFO_FIELDS
        }

    @classmethod
    def parse(cls, held: Mapping[str, str]) -> Self:
        """Inverse of fields(); extra fields (the heartbeat) are ignored.  Raises ValueError, also for a
        missing field."""
        given: dict[str, Any] = {}
        for name in _INFO_FIELDS:
            if name not in held:
                raise ValueError(f"lease has no field {name!r}")
            text = held[name]
            if name in _TUPLES:
                given[name] = tuple(part for part in text.split(",") if part)
            else:
                given[name] = int(text) if name in _INTS else text
        return cls(**given)


_INFO_FIELDS = tuple(f.name for f in fields(WorkerInfo))
_TUPLES = frozenset({"probe_keys", "tiers"})
_INTS = frozenset({"chunk_tokens", "block_size", "world_size", "payload_bytes", "epoch"})


class Lease(NamedTuple):
    """A worker that is alive: what it is, and the heartbeat as it wrote it."""

    info: WorkerInfo
    beat: Mapping[str, str]


def lease_name(namespace: str, worker_id: str) -> str:
    """`namespace` in hex."""
    return f"cairn:{namespace}:worker:{worker_id}"


def epoch_name(namespace: str, worker_id: str) -> str:
    """`namespace` in hex."""
    return f"cairn:{namespace}:epoch:{worker_id}"


def mark_name(namespace: str, worker_id: str, n: int) -> str:
    """`namespace` in hex; `n` is whatever number makes a Cluster keep the mark on the server it is about."""
    return f"cairn:{namespace}:mark:{{{n}}}:{worker_id}"


def chunk_name(namespace: Namespace | bytes, root: ChunkKey, key: ChunkKey) -> bytes:
    """`root` is the prompt's first chunk key."""
    return b"cairn:%b:{%b}:%b" % (namespace.hex().encode(), root[:8].hex().encode(), key)


def field_of(worker_id: str, epoch: int) -> str:
    """The name under which one life of a worker holds chunks."""
    return f"{worker_id}{SEPARATOR}{epoch}"


def holder_of(field: str) -> tuple[str, int]:
    """Inverse of field_of().  Raises ValueError."""
    worker_id, _, epoch = field.rpartition(SEPARATOR)
    return worker_id, int(epoch)
