"""The cache as Redis, one server or a Cluster, tells of it: who is alive, who holds which chunk where, what a
blob says of itself.

Everything here reads.  Unlike the router's look-up this one asks for every chunk, and asks the shared tier
itself: a person who looks wants what is, not what is likely.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import redis

from cacheengine import frame, redis_url
from cacheengine.config import ConfigError
from cacheengine.errors import BadFrame, IndexDown
from cacheengine.frame import HEADER_BYTES
from cacheengine.index_reader import Fleet
from cacheengine.index_schema import DEVICE, DISK, HOST, Lease, WorkerInfo, chunk_name, field_of
from cacheengine.keys import KEY_BYTES, ChunkKey, KeyScheme, Namespace
from cacheengine.tiers.redis import escape
from cacheengine.wishes import names_of
from gateway.launch.errors import LaunchError, UsageError
from router.worker import from_lease

_SECONDS = 5.0  # for one command
_BATCH = 256  # chunks a round trip
_SCAN = 1000
_TIERS = {"device": DEVICE, "host": HOST, "disk": DISK}


@dataclass(frozen=True, slots=True)
class Row:
    """One worker and one prompt, in chunks.  `hit` is what a request would find there: the unbroken run from
    the front over all tiers; the tiers say where the chunks of that run lie."""

    worker: str
    namespace: str
    chunk_tokens: int
    chunks: int  # full chunks of the prompt
    hit: int
    device: int
    host: int
    disk: int
    redis: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk is."""

    bits: dict[str, int]  # worker id → tier bitmap
    shared: bool  # whole in Redis, for every rank


def connect(url: str) -> redis.Redis:
    """Raises LaunchError; its sentence never holds the URL, which may hold a password."""
    try:
        client = redis_url.client(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS, protocol=2)
        client.ping()
    except ConfigError as exc:
        raise UsageError(str(exc)) from None
    except (*redis_url.DOWN, OSError) as exc:
        raise LaunchError(f"Redis does not answer ({type(exc).__name__}); is its URL right?") from None
    return client


def leases(url: str) -> list[Lease]:
    """Every worker that is alive, by id.  Raises LaunchError."""

    async def read() -> list[Lease]:
        fleet = Fleet(url)
        try:
            return await fleet.read()
        finally:
            await fleet.close()

    try:
        found = asyncio.run(read())
    except IndexDown:
        raise LaunchError("Redis stopped answering") from None
    return sorted(found, key=lambda lease: lease.info.worker_id)


def _trusted(lease: Lease) -> bool:
    try:
        return from_lease(lease).trusted
    except ValueError:
        return False


def serving(alive: Sequence[Lease], model: str | None) -> list[Lease]:
    """Those of one model: the named one, or the only one there is.  Raises LaunchError."""
    names = sorted({lease.info.model for lease in alive})
    if not names:
        raise LaunchError(
            "no worker is alive in this Redis; `cairn up` starts some, `cairn doctor` says more"
        )
    if model is None and len(names) > 1:
        raise UsageError(f"several models are served; choose one with --model: {', '.join(names)}")
    if model is not None and model not in names:
        raise LaunchError(f"no live worker serves {model!r}; alive: {', '.join(names)}")
    return [lease for lease in alive if lease.info.model == (model or names[0])]


def by_scheme(workers: Sequence[Lease]) -> dict[KeyScheme, list[Lease]]:
    """Workers that can share chunks, under the scheme that names these.  Raises LaunchError where nobody
    names chunks as we do."""
    groups: dict[KeyScheme, list[Lease]] = {}
    for lease in filter(_trusted, workers):
        namespace = Namespace(bytes.fromhex(lease.info.namespace))
        groups.setdefault(KeyScheme(namespace, lease.info.chunk_tokens), []).append(lease)
    if workers and not groups:
        known = ", ".join(lease.info.worker_id for lease in workers)
        raise LaunchError(f"{known} name chunks in another way than this program; is it the same version?")
    return groups


def blob_names(info: WorkerInfo, key: ChunkKey) -> Iterator[tuple[str, str]]:
    """Metadata and bytes of a chunk in the shared tier, for every rank."""
    for rank in range(info.world_size):
        meta = f"{escape(info.model)}@{info.world_size}@{rank}@{key.hex()}"
        yield meta, meta + "_bytes"


def places(
    client: redis.Redis, group: Sequence[Lease], keys: Sequence[ChunkKey], roots: Mapping[ChunkKey, ChunkKey]
) -> list[Place]:
    """Where each of these chunks is, for workers of one namespace.  Raises what redis-py raises."""
    info = group[0].info
    namespace = Namespace(bytes.fromhex(info.namespace))
    names = {field_of(lease.info.worker_id, lease.info.epoch): lease.info.worker_id for lease in group}
    found = []
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        with client.pipeline(transaction=False) as pipe:
            for key in batch:
                pipe.hgetall(chunk_name(namespace, roots.get(key, key), key))
                for name in (name for pair in blob_names(info, key) for name in pair):
                    pipe.exists(name)  # one by one: on a Cluster they are on several nodes
            answers = pipe.execute()
        each = 1 + 2 * info.world_size
        for at in range(0, len(answers), each):
            lives = {field.decode(): int(bits) for field, bits in answers[at].items()}
            held = {names[field]: bits for field, bits in lives.items() if field in names}
            found.append(Place(held, all(answers[at + 1 : at + each])))
    return found


def find_roots(client: redis.Redis, namespace: str, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkKey]:
    """Index entries are filed under the first 8 bytes of their prompt's first key, which a key alone does not
    tell: look at every entry of the namespace.  Keys that nobody announces are left out."""
    wanted, roots = set(keys), dict[ChunkKey, ChunkKey]()
    for name in client.scan_iter(f"cairn:{namespace}:{{*", count=_SCAN):
        key = ChunkKey(name[-KEY_BYTES:])
        if key in wanted:
            root = name[: -KEY_BYTES - 1].rpartition(b"{")[2].removesuffix(b"}")
            roots[key] = ChunkKey(bytes.fromhex(root.decode()))
            if len(roots) == len(wanted):
                break
    return roots


def rows(client: redis.Redis, group: Sequence[Lease], keys: Sequence[ChunkKey], *, loose: bool) -> list[Row]:
    """How much of a prompt each worker of one namespace could serve.  `loose`: the keys were given one by one
    and need not begin a prompt."""
    if loose:
        roots = find_roots(client, group[0].info.namespace, keys)
    else:
        roots = dict.fromkeys(keys, keys[0]) if keys else {}
    found = places(client, group, keys, roots)
    return [_row(lease.info, found) for lease in group]


def _row(info: WorkerInfo, found: Sequence[Place]) -> Row:
    held = [(place.bits.get(info.worker_id, 0), place.shared) for place in found]
    run = list(takewhile(lambda here: (here[0] & (DEVICE | HOST | DISK)) or here[1], held))
    counts = {tier: sum(bool(bits & bit) for bits, _ in run) for tier, bit in _TIERS.items()}
    shared = sum(whole for _, whole in run)
    return Row(
        info.worker_id, info.namespace, info.chunk_tokens, len(found), len(run), **counts, redis=shared
    )


def inspect(client: redis.Redis, group: Sequence[Lease], key: ChunkKey) -> dict[str, Any] | None:
    """Everything Redis knows of one chunk, in plain types; None when that is nothing."""
    info = group[0].info
    (place,) = places(client, group, [key], find_roots(client, info.namespace, [key]))
    pinned = bool(client.sismember(names_of(info.namespace)[1], key.hex()))
    blobs = [_blob(client, info, key, rank, *names) for rank, names in enumerate(blob_names(info, key))]
    if not place.bits and not any(blobs) and not pinned:
        return None
    return {
        "key": key.hex(),
        "model": info.model,
        "namespace": info.namespace,
        "pinned": pinned,
        "held": {
            worker: [tier for tier, bit in _TIERS.items() if bits & bit]
            for worker, bits in place.bits.items()
        },
        "blobs": [blob for blob in blobs if blob],
    }


def _blob(
    client: redis.Redis, info: WorkerInfo, key: ChunkKey, rank: int, meta: str, data: str
) -> dict[str, Any]:
    """One rank's blob, its frame read and its payload checked as the tier would; empty when there is none."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(meta)
        pipe.ttl(meta)
        pipe.ttl(data)
        pipe.strlen(data)
        pipe.getrange(data, 0, HEADER_BYTES - 1)
        about, meta_ttl, data_ttl, length, header = pipe.execute()
    if not about and not length:
        return {}
    blob: dict[str, Any] = {
        "name": data,
        "bytes": length,
        "ttl_seconds": {"metadata": _ttl(meta_ttl), "bytes": _ttl(data_ttl)},
        "metadata": {name.decode(): value.decode("utf-8", "replace") for name, value in about.items()},
    }
    try:
        namespace = Namespace(bytes.fromhex(info.namespace))
        facts = frame.parse(header, namespace, key, length - HEADER_BYTES, rank, info.world_size, None)
        blob["frame"] = {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in facts._asdict().items()
        } | {"checksum": f"{facts.checksum:016x}"}  # as in the metadata
        frame.verify(facts, cast(bytes, client.getrange(data, HEADER_BYTES, -1)))
        blob["verdict"] = "whole" if about else "no metadata: a miss until it is written again"
    except BadFrame as exc:
        blob["verdict"] = f"bad frame: {exc}" if length else "no bytes: a miss"
    return blob


def _ttl(seconds: int) -> int | None:
    """None: never expires, or is not there."""
    return seconds if seconds >= 0 else None
