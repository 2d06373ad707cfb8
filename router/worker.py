"""A worker as the router sees it: what it is, and how busy it said it was."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

from cacheengine.index_schema import Lease, WorkerInfo
from cacheengine.keys import KeyScheme, Namespace, probe_keys

MAX_CHUNK_BYTES = 1 << 50  # a lease that says more lies
MAX_CHUNK_TOKENS = 1 << 24
MAX_LOAD = 1e15  # of any field of a heartbeat: sums of it stay finite

_LABEL = r"[A-Za-z0-9_-]{1,63}"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")


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
    computed_tokens: float = 0  # since the worker started: stands still when it does
    max_num_seqs: float = 0  # requests it runs at once


UNKNOWN = Load()


@dataclass(frozen=True, slots=True)
class Worker:
    """Frozen: the registry makes new ones every refresh.  What follows from it is worked out once, here."""

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
    # how to name its chunks; None where its names cannot be used
    scheme: KeyScheme | None = field(init=False, repr=False, compare=False)
    # whether it can load from the shared tier now; a worker that does not say can
    shares: bool = field(init=False, repr=False, compare=False)
    bandwidth: Mapping[str, float] = field(init=False, repr=False, compare=False)  # bytes/s by tier

    def __post_init__(self) -> None:
        named = self.namespace if self.trusted else None
        scheme = None if named is None else KeyScheme(named, self.chunk_tokens)
        shares = ("shared" in self.tiers or "redis" in self.tiers) and self.beat.get("redis_up") != "0"
        load = self.load
        speeds = {"host": load.bw_host, "disk": load.bw_disk, "shared": load.bw_redis}
        for name, value in (("scheme", scheme), ("shares", shares), ("bandwidth", speeds)):
            object.__setattr__(self, name, value)


def from_lease(lease: Lease) -> Worker:
    """Raises ValueError for a URL, namespace or size that cannot be."""
    info = lease.info
    if not 1 <= info.chunk_tokens <= MAX_CHUNK_TOKENS:
        raise ValueError(f"{info.worker_id}: chunk_tokens={info.chunk_tokens}")
    if not 0 <= info.payload_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"{info.worker_id}: payload_bytes is out of range")
    try:
        url = base_url(info.url)
    except ValueError as exc:
        raise ValueError(f"{info.worker_id}: {exc}") from None
    scheme = KeyScheme(Namespace(bytes.fromhex(info.namespace)), info.chunk_tokens)
    return Worker(
        id=info.worker_id,
        url=url,
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


def base_url(url: str) -> str:
    """Without a slash at its end.  Raises ValueError for what cannot be asked, and for a user or password in
    it: worker URLs become names in headers, metrics and logs.  The message does not repeat the URL."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise ValueError("the URL of a worker is malformed") from None
    if parsed.scheme not in ("http", "https"):
        raise ValueError("the URL of a worker should begin with http:// or https://")
    if "@" in url or "?" in url or "#" in url:
        raise ValueError("the URL of a worker should hold no user, password, query or fragment")
    host = parsed.raw_host.decode("ascii")
    if ":" not in host and not _HOST.fullmatch(host):  # an IPv6 address was checked by the parser
        raise ValueError("the URL of a worker holds no possible host")
    if parsed.port is not None and not 1 <= parsed.port <= 65535:
        raise ValueError("the port in the URL of a worker should be 1 to 65535")
    return url.rstrip("/")


def from_static(static: StaticWorker) -> Worker:
    """Named by its address.  Raises ValueError for a URL that cannot be."""
    url = base_url(static.url)
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
    """A field that is missing or no finite number counts as not measured."""
    values = []
    for name in Load._fields:
        try:
            value = float(beat.get(name, 0))
        except ValueError:
            value = 0.0
        values.append(min(max(0.0, value), MAX_LOAD) if math.isfinite(value) else 0.0)
    return Load(*values)
