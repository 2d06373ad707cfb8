"""Where workers come from: one small class per way of learning of them.

A source names every worker it knows of now.  One that cannot be asked raises SourceDown, and the registry
keeps what it heard last.  Earlier sources win over later ones that name the same worker or the same URL.
"""

import asyncio
import logging
import math
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

import yaml

from cacheengine.errors import IndexDown
from cacheengine.index_reader import Fleet
from router.worker import StaticWorker, Worker, base_url, from_lease, from_static

log = logging.getLogger(__name__)

STALE_SECONDS = 10.0  # a lease may be late, and a name server may leave out an address once
DNS_SECONDS = 5.0  # between two resolutions of one name
DNS_PATIENCE = 1.0  # then the last answer stands; the question is not asked twice at a time

_WORKER = re.compile(r"(.+?)=(?:(https?://[^/=@]+)|dns://([^/=:@]+):([0-9]{1,5}))/?")


class SourceDown(Exception):
    """The source cannot be asked now; what it said last may still be true."""


class Source(Protocol):
    """REQUIRES: read() is called by one task at a time."""

    name: str
    vouches: bool  # being named just now is a sign of life: nobody has to ask /health
    grace_seconds: float  # how long a worker stays that is no longer named

    async def read(self) -> Sequence[Worker]:
        """Everybody it knows of now.  Raises SourceDown."""
        ...


@dataclass(frozen=True, slots=True)
class DnsName:
    """A name whose every address is a worker of `model`, as `dns://host:port`."""

    host: str
    port: int
    model: str


def parse_worker(text: str) -> StaticWorker | DnsName:
    """`model=http://host:port` or `model=dns://host:port`.  Raises ValueError, which does not repeat the
    text: a password may be in it."""
    found = _WORKER.fullmatch(text)
    if found is None:
        raise ValueError("a worker should read model=http://host:port or model=dns://host:port")
    model, url, host, port = found.groups()
    base_url(url or f"http://{host}:{port}")
    return StaticWorker(url, model) if url else DnsName(host, int(port), model)


class Leases:
    """Workers that register themselves in Redis, with a heartbeat."""

    name, vouches, grace_seconds = "lease", True, STALE_SECONDS

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def read(self) -> list[Worker]:
        try:
            leases = await self._fleet.read()
        except IndexDown as exc:
            raise SourceDown(str(exc)) from exc
        workers = []
        for lease in leases:
            try:
                workers.append(from_lease(lease))
            except ValueError as exc:
                log.warning("ignoring a lease: %s", exc)
        return workers


class Static:
    """Workers named in the configuration."""

    name, vouches, grace_seconds = "static", False, 0.0

    def __init__(self, workers: Sequence[StaticWorker]) -> None:
        self._workers = list(map(from_static, workers))

    async def read(self) -> list[Worker]:
        return self._workers


async def _resolve(host: str, port: int) -> list[str]:
    """A and AAAA, by the system's resolver, best first (RFC 6724).  Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Dns:
    """Every address of a name is a worker: the headless service of an orchestrator, say.

    A worker may have an address of each family, and nothing says which two belong together.  So one family
    counts: the one the resolver puts first, and then that one as long as it is there, since a worker with
    another address is another worker."""

    name, vouches, grace_seconds = "dns", False, STALE_SECONDS

    def __init__(
        self,
        name: DnsName,
        resolve: Callable[[str, int], Awaitable[list[str]]] = _resolve,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`resolve`: host and port to addresses, best first; raises OSError."""
        self._of, self._resolve, self._clock = name, resolve, clock
        self._asking: asyncio.Future[list[str]] | None = None
        self._v6: bool | None = None  # the family that counts
        self._ask_at = math.inf  # when the answer in hand has become old; none in hand: never

    async def read(self) -> list[Worker]:
        asking = self._asking
        if asking is None or self._clock() >= self._ask_at:
            asking = self._asking = asyncio.ensure_future(self._resolve(self._of.host, self._of.port))
            self._ask_at = math.inf
        done, _ = await asyncio.wait([asking], timeout=DNS_PATIENCE)
        if not done:
            raise SourceDown(f"{self._of.host}: no answer from the name server")
        self._ask_at = min(self._ask_at, self._clock() + DNS_SECONDS)
        try:
            addresses = asking.result()
        except (OSError, UnicodeError) as exc:
            raise SourceDown(f"{self._of.host}: {exc}") from exc
        families = [":" in address for address in addresses]
        if families and self._v6 not in families:
            self._v6 = families[0]
        ours = {address for address, v6 in zip(addresses, families, strict=True) if v6 == self._v6}
        return [from_static(StaticWorker(self._url(one), self._of.model)) for one in sorted(ours)]

    def _url(self, address: str) -> str:
        host = f"[{address}]" if ":" in address else address
        return f"http://{host}:{self._of.port}"


class WorkersFile:
    """A YAML (or JSON) list of `model=http://host:port`, read again whenever it changes.

    It may be seen half written: one that is empty is a source that is down (`[]` is nobody), and a worker
    that is not in it leaves after a while."""

    name, vouches, grace_seconds = "file", False, STALE_SECONDS

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._workers: list[Worker] = []
        self._trouble = ""

    async def read(self) -> list[Worker]:
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[Worker]:
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                self._workers = _listed(yaml.safe_load(self._path.read_text(encoding="utf-8")))
                self._seen = seen
        except (OSError, UnicodeError, ValueError, yaml.YAMLError) as exc:
            trouble = f"{self._path}: {str(exc).splitlines()[0]}"
            if trouble != self._trouble:  # once, not every second
                log.warning("keeping the workers read before: %s", trouble)
            self._trouble = trouble
            raise SourceDown(trouble) from exc
        self._trouble = ""
        return self._workers


def _listed(document: object) -> list[Worker]:
    """Raises ValueError."""
    if document is None:
        raise ValueError("it is empty; a list of nobody is []")
    if not isinstance(document, list) or not all(isinstance(line, str) for line in document):
        raise ValueError("it should be a list of model=http://host:port")
    workers = []
    for place, line in enumerate(document, 1):
        try:
            worker = parse_worker(line)
        except ValueError as exc:
            raise ValueError(f"entry {place}: {exc}") from None
        if isinstance(worker, DnsName):
            raise ValueError(f"entry {place}: names to resolve belong into `workers`")
        workers.append(from_static(worker))
    return workers
