"""A worker as the router sees it: what it is, and how busy it said it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cacheengine.index_schema import Lease, WorkerInfo
from cacheengine.keys import KeyScheme, Namespace, probe_keys


@dataclass(frozen=True, slots=True)
class StaticWorker:
    """An address from the configuration: any OpenAI-compatible server, with or without our cache."""

    url: str
    model: str


class Load(NamedTuple):
    """The last heartbeat.  0 means the worker has not measured it yet."""

    running: float = 0
    waiting: float = 0
    queued_tokens: float = 0  # prompt tokens not yet computed
    prefill_rate: float = 0  # tokens/s
    bw_host: float = 0  # bytes/s, as are the next two
    bw_disk: float = 0
    bw_redis: float = 0
    beat_ms: float = 0  # server time; a new value is a new heartbeat


UNKNOWN = Load()


@dataclass(frozen=True, slots=True)
class Worker:
    """Frozen: the registry makes new ones every refresh."""

    id: str
    url: str
    model: str  # served name
    model_path: str = ""
    namespace: Namespace | None = None  # None: no cache we know of, so never a hit
    chunk_tokens: int = 0
    epoch: int = 0  # of its present life in the index
    boot_id: str = ""  # of its process
    block_size: int = 0
    token_bytes: float = 0  # KV bytes of one token, all ranks together
    tiers: tuple[str, ...] = ()
    trusted: bool = False  # it names chunks as we do (handshake)
    stale: bool = False  # known from earlier: its lease cannot be read now
    adapters: tuple[str, ...] = ()  # LoRA adapters it serves, by the names clients use
    share: float = 1.0  # of the prompts new to it that it may take; rises while it is new
    load: Load = UNKNOWN
    beat: Mapping[str, str] = field(default_factory=dict, repr=False)  # the heartbeat as it was written

    @property
    def scheme(self) -> KeyScheme | None:
        """How to name this worker's chunks; None where its names cannot be used."""
        if self.namespace is None or not self.trusted:
            return None
        return KeyScheme(self.namespace, self.chunk_tokens)

    @property
    def shares(self) -> bool:
        """Whether it can load from the shared tier now; a worker that does not say can."""
        return ("shared" in self.tiers or "redis" in self.tiers) and self.beat.get("redis_up") != "0"


def from_lease(lease: Lease) -> Worker:
    """Raises ValueError for a namespace or chunk size that cannot be."""
    info = lease.info
    scheme = KeyScheme(Namespace(bytes.fromhex(info.namespace)), info.chunk_tokens)
    if info.chunk_tokens < 1:
        raise ValueError(f"{info.worker_id}: chunk_tokens={info.chunk_tokens}")
    return Worker(
        id=info.worker_id,
        url=info.url.rstrip("/"),
        model=info.model,
        model_path=info.model_path,
        namespace=scheme.namespace,
        chunk_tokens=info.chunk_tokens,
        epoch=info.epoch,
        boot_id=info.boot_id,
        block_size=info.block_size,
        token_bytes=info.payload_bytes / info.chunk_tokens,
        tiers=info.tiers,
        trusted=_same_keys(info, scheme),
        load=_load(lease.beat),
        beat=dict(lease.beat),
    )


def from_static(static: StaticWorker) -> Worker:
    """Named by its address."""
    url = static.url.rstrip("/")
    return Worker(id=url.partition("://")[2] or url, url=url, model=static.model)


def majority_scheme(workers: Sequence[Worker]) -> KeyScheme | None:
    """The scheme most of the workers share; the smaller namespace on a tie, so every gateway agrees."""
    votes: dict[tuple[bytes, int], int] = {}
    for worker in workers:
        if (scheme := worker.scheme) is not None:
            name = (bytes(scheme.namespace), scheme.chunk_tokens)
            votes[name] = votes.get(name, 0) + 1
    if not votes:
        return None
    namespace, chunk_tokens = min(votes, key=lambda name: (-votes[name], name))
    return KeyScheme(Namespace(namespace), chunk_tokens)


def _same_keys(info: WorkerInfo, scheme: KeyScheme) -> bool:
    return list(info.probe_keys) == probe_keys(scheme)


def _load(beat: Mapping[str, str]) -> Load:
    """A field that is missing or no number counts as not measured."""
    values = []
    for name in Load._fields:
        try:
            values.append(max(0.0, float(beat.get(name, 0))))
        except ValueError:
            values.append(0.0)
    return Load(*values)
