"""What `cairn pin`, `unpin` and `clear` do in Redis: say a wish, see to the blobs, wait for the workers."""

import getpass
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import redis

from cacheengine import redis_url
from cacheengine.config import CacheConfig
from cacheengine.index_schema import Lease
from cacheengine.keys import ChunkKey
from cacheengine.tiers.redis import escape
from cacheengine.wishes import Verb, make, model_of, obeyed_in
from gateway.cache_view import blob_names

TTL_SECONDS: int = CacheConfig.model_fields["redis_ttl_seconds"].default
_BATCH = 256
_SCAN = 1000
_POLL_SECONDS = 0.2
_GLOB = re.compile(r"([\\*?\[\]])")
_WISHES = re.compile(r"cairn:\{([0-9a-f]{32})\}:wishes")


def say(
    client: redis.Redis, namespaces: Sequence[str], verb: Verb, keys: Sequence[ChunkKey] = ()
) -> dict[str, int]:
    """Namespace → the number its workers will announce.  Raises TooManyPins."""
    return {namespace: make(client, namespace, verb, keys, _me())[0] for namespace in namespaces}


def _me() -> str:
    try:
        who = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        who = str(os.getuid())
    return f"{who}@{socket.gethostname()}"


def wait(
    alive: Callable[[], Sequence[Lease]],
    verb: Verb,
    numbers: Mapping[str, int],
    seconds: float,
    tell: Callable[[int, int], None],
) -> list[str]:
    """Until every live worker has announced that it obeyed, or `seconds` have passed; `tell` hears how many
    of how many have.  Returns the ids of those that have not.

    A worker that goes away meanwhile is not waited for: it catches up when it starts again.
    """
    until = time.monotonic() + seconds
    while True:
        concerned = [lease for lease in alive() if lease.info.namespace in numbers]
        late = [lease.info.worker_id for lease in concerned if not _has_obeyed(lease, verb, numbers)]
        tell(len(concerned) - len(late), len(concerned))
        if not late or time.monotonic() > until:
            return late
        time.sleep(_POLL_SECONDS)


def _has_obeyed(lease: Lease, verb: Verb, numbers: Mapping[str, int]) -> bool:
    said = obeyed_in(lease.beat)
    number = said.clear_epoch if verb == "clear" else said.pins_version
    return number >= numbers[lease.info.namespace]


def keep_blobs(
    client: redis.Redis, group: Sequence[Lease], keys: Sequence[ChunkKey], *, for_ever: bool
) -> None:
    """Take the expiry of these chunks' blobs away, or give it back.  Those that are not there stay so."""
    for start in range(0, len(keys), _BATCH):
        with client.pipeline(transaction=False) as pipe:
            for key in keys[start : start + _BATCH]:
                for name in (name for pair in blob_names(group[0].info, key) for name in pair):
                    if for_ever:
                        pipe.persist(name)
                    else:
                        pipe.expire(name, TTL_SECONDS)
            pipe.execute()


def namespaces_of(client: redis.Redis, alive: Sequence[Lease], model: str) -> list[str]:
    """Every namespace this model was ever served under, as far as Redis remembers: also those whose workers
    are all down, so that they find the wish when they start."""
    known = {lease.info.namespace for lease in alive if lease.info.model == model}
    for name in client.scan_iter("cairn:{*}:wishes", count=_SCAN):
        found = _WISHES.fullmatch(cast(bytes, name).decode("utf-8", "replace"))
        if found and model_of(client, found[1]) == model:
            known.add(found[1])
    return sorted(known)


def unlink_blobs(client: redis.Redis, model: str) -> Iterator[tuple[int, int]]:
    """Delete a model's shared tier, batch by batch, without blocking the server.  Yields (keys looked at,
    keys deleted) for each; only names of exactly our shape are touched."""
    name = escape(model)
    ours = re.compile(rf"{re.escape(name)}@\d+@\d+@[0-9a-f]{{32}}(_bytes)?".encode())
    pattern = _GLOB.sub(r"\\\1", name) + "@*"
    for server in redis_url.servers_of(client):
        cursor = -1
        while cursor:
            cursor, found = cast(tuple[int, list[bytes]], server.scan(max(cursor, 0), pattern, _SCAN))
            with client.pipeline(transaction=False) as pipe:
                for key in filter(ours.fullmatch, found):
                    pipe.unlink(key)  # one by one: on a Cluster no two need share a slot
                yield _SCAN, sum(pipe.execute())
