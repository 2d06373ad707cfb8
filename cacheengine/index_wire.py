"""What an index writer says to Redis: one connection's worth of scripts, and where on a Cluster they go.

A *mark* is a number a worker leaves on a server behind each batch, in the same pipeline.  A server loses the
end of what it was told, never the middle (a restart from an older file, a failover to a replica that lagged,
FLUSHALL); so a mark that is older than the last batch it acknowledged says that batches are missing there.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import NoScriptError
from redis.retry import Retry

from cacheengine import redis_url
from cacheengine.index_schema import (
    FLEET,
    SEPARATOR,
    WRONG_TYPE,
    Entry,
    WorkerInfo,
    chunk_name,
    epoch_name,
    field_of,
    holder_of,
    lease_name,
    mark_name,
)
from cacheengine.keys import ChunkKey
from cacheengine.wishes import Listener, names_of

SOCKET_SECONDS = 2.0
EPOCH_TTL_MS = 30 * 86_400_000  # after that the server's clock alone carries the epoch
MARK_TTL_MS = 86_400_000
FLEET_FORGET_MS = 3_600_000
MAX_TAGS = 65_536  # tried until one lies on the wanted node of a Cluster

_LUA = Path(__file__).parent
_SCRIPTS = {name: (_LUA / f"index_{name}.lua").read_text() for name in ("epoch", "beat", "write", "check")}
_SHAS = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in _SCRIPTS.items()}


class Wire:
    """One session with Redis.  `marks` outlives it: name of a mark → number of the last batch acknowledged.

    Connects when made, to a Cluster.  Everything raises what redis-py raises (redis_url.DOWN, OSError).
    """

    def __init__(self, url: str, ttl_seconds: float, marks: dict[str, int]) -> None:
        self._ttl_ms, self._marks = int(ttl_seconds * 1000), marks
        self._client = redis_url.client(
            url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            retry=Retry(NoBackoff(), 0),  # the writer retries, with the books put right first
            protocol=2,
        )
        self._tags: dict[int, str] = {}  # id of a server's client → the mark to leave there

    def close(self) -> None:
        self._client.close()

    def epoch(self, info: WorkerInfo) -> tuple[int, int]:
        """The next one of this worker's name, and the last one before it; 0: nobody remembers any."""
        name = epoch_name(info.namespace, info.worker_id)
        epoch, before = self._run(self._at(name), "epoch", name, [info.epoch, EPOCH_TTL_MS])
        return int(epoch), int(before)

    def beat(self, info: WorkerInfo, lease_seconds: float, words: Mapping[str, str]) -> int:
        """Renew the lease and say `words` in it.  Returns the epoch that was found there, 0 for none; a
        higher one than `info`'s belongs to a younger process and was left alone."""
        name = lease_name(info.namespace, info.worker_id)
        pairs = [part for pair in (dict(words) | info.fields()).items() for part in pair]
        found, now = self._run(self._at(name), "beat", name, [int(lease_seconds * 1000), info.epoch, *pairs])
        if not found or int(found) <= info.epoch:
            with self._at(FLEET).pipeline(transaction=False) as pipe:
                pipe.zadd(FLEET, {f"{info.namespace}:{info.worker_id}": int(now)})
                pipe.zremrangebyscore(FLEET, "-inf", int(now) - FLEET_FORGET_MS)
                pipe.execute()
        return int(found or 0)

    def listen(self, wishes: Listener, namespace: str) -> bool:
        """Whether a wish was obeyed, which the next beat should say."""
        server = self._at(names_of(namespace)[0])
        with server.pipeline(transaction=False) as pipe:
            wishes.ask(pipe)
            answers = pipe.execute()
        return wishes.hear(server, answers)

    def leave(self, info: WorkerInfo) -> None:
        """Give the lease back, if it is ours."""
        name = lease_name(info.namespace, info.worker_id)
        held = self._client.hget(name, "epoch")
        if held is not None and int(cast(bytes, held)) == info.epoch:
            self._client.delete(name)
            self._client.zrem(FLEET, f"{info.namespace}:{info.worker_id}")

    def write(self, info: WorkerInfo, entries: Sequence[Entry], before: int = 0) -> None:
        """One round trip to each server concerned; one script call per prefix family, removals before
        additions.  `before`: the epoch of a life that is over, whose fields go from these chunks.

        Keys travel packed: four arguments a family instead of three commands a chunk keep the time this
        thread holds the engine's interpreter lock small.
        """
        families: dict[ChunkKey, list[Entry]] = {}
        for entry in sorted(entries, key=lambda e: e.bits != 0):
            families.setdefault(entry.root, []).append(entry)
        over = (field_of(info.worker_id, before),) if before else ()
        self._tell("write", info, list(families.values()), over)

    def check(self, info: WorkerInfo, pieces: Sequence[Sequence[Entry]]) -> tuple[int, set[str]]:
        """Mend what differs and renew expiries.  `pieces`: each of one family.  Returns how many entries were
        wrong, and the fields of everybody else who is named there."""
        answers = self._tell("check", info, pieces)
        return sum(answer[0] for answer in answers), {f.decode() for a in answers for f in a[1:]}

    def sweep(self, info: WorkerInfo, pieces: Sequence[Sequence[Entry]], dead: Iterable[str]) -> None:
        """Remove the fields of lives that are over, where this worker holds the chunk too."""
        self._tell("check", info, pieces, tuple(dead))

    def lives(self, namespace: str) -> tuple[set[str], int]:
        """The fields of all workers that are alive, and the server's time in ms before they were read."""
        now = cast(Any, self._at(FLEET).time())
        members = cast(list[bytes], self._client.zrange(FLEET, 0, -1))
        ids = [
            m.removeprefix(namespace + ":")
            for raw in members
            if (m := raw.decode()).startswith(namespace + ":")
        ]
        epochs: list[Any] = []
        with self._client.pipeline(transaction=False) as pipe:
            for worker_id in ids:
                pipe.hget(lease_name(namespace, worker_id), "epoch")
            epochs = pipe.execute(raise_on_error=False) if ids else []
        for answer in epochs:
            if isinstance(answer, Exception) and not str(answer).startswith(WRONG_TYPE):
                raise answer
        alive = zip(ids, epochs, strict=True)
        return {f"{i}{SEPARATOR}{e.decode()}" for i, e in alive if isinstance(e, bytes)}, int(now[0]) * 1000

    def lost(self) -> bool:
        """Whether a server forgot something it had acknowledged."""
        for name, acknowledged in self._marks.items():
            found = cast("bytes | None", self._client.get(name))
            if found is None or int(found) < acknowledged:
                return True
        return False

    def _tell(
        self, script: str, info: WorkerInfo, pieces: Sequence[Sequence[Entry]], extra: Sequence[str] = ()
    ) -> list[Any]:
        """Run a script for each piece, everything for one server in one round trip, its mark last."""
        namespace, field = bytes.fromhex(info.namespace), field_of(info.worker_id, info.epoch)
        calls: dict[int, tuple[redis.Redis, list[tuple[bytes, list[Any]]]]] = {}
        for piece in pieces:
            if not piece:
                continue
            name = chunk_name(namespace, piece[0].root, piece[0].root)
            packed = b"".join(entry.key for entry in piece)
            bitmaps = bytes(entry.bits for entry in piece)
            server = self._at(name)
            mine = calls.setdefault(id(server), (server, []))[1]
            mine.append((name, [field, self._ttl_ms, packed, bitmaps, *extra]))
        answers = []
        for server, mine in calls.values():
            mark = self._tag(server, info)
            number = self._marks.get(mark, info.epoch) + 1

            def batch(pipe: Pipeline, mine: Any = mine, mark: str = mark, number: int = number) -> None:
                for name, args in mine:
                    pipe.evalsha(_SHAS[script], 1, name, *args)
                pipe.set(mark, number, px=MARK_TTL_MS)

            answers += _piped(server, batch)[:-1]
            self._marks[mark] = number
        return answers

    def _tag(self, server: redis.Redis, info: WorkerInfo) -> str:
        """The name of our mark on this server."""
        if (mark := self._tags.get(id(server))) is None:
            for n in range(MAX_TAGS):
                mark = mark_name(info.namespace, info.worker_id, n)
                if self._at(mark) is server:
                    break
            else:
                raise redis.exceptions.RedisClusterException("no slot found for a node that serves some")
            self._tags[id(server)] = mark
        return mark

    def _at(self, name: str | bytes) -> redis.Redis:
        return redis_url.server_of(self._client, name)

    def _run(self, server: redis.Redis, script: str, name: str, args: Sequence[Any]) -> Any:
        return _piped(server, lambda pipe: pipe.evalsha(_SHAS[script], 1, name, *args))[0]


def _piped(server: redis.Redis, fill: Callable[[Pipeline], object]) -> list[Any]:
    """One round trip.  A server that does not know our scripts ran none of them, and is taught."""
    for last in (False, True):
        with server.pipeline(transaction=False) as pipe:
            fill(pipe)
            try:
                return pipe.execute()
            except NoScriptError:
                if last:
                    raise
                for text in _SCRIPTS.values():
                    server.script_load(text)
    raise AssertionError("unreachable")


def epoch_of(field: str) -> int:
    """0 for a field nobody of us wrote."""
    try:
        return holder_of(field)[1]
    except ValueError:
        return 0
