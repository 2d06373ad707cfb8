"""Which server has a key: one server, the master that Sentinel names, or the nodes of a Cluster.

A topology answers from memory; it asks the network only when it knows nothing, or was told to distrust what
it knows (a connection failed, a server said it is the wrong one).  Safe for several threads: two that find
it empty both ask, and the later answer stays.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from redis.crc import key_slot

from cacheengine.errors import TierDown
from cacheengine.redis_url import Address, RedisUrl
from cacheengine.tiers.resp import Command, Connection, ErrorReply, Reply

SLOTS = 1 << 14
_QUESTION_SECONDS = 0.2  # longest wait for one Sentinel or node, when there are others to ask
_MAX_NODES = 1024  # of a Cluster; what a broken one could make us remember

log = logging.getLogger(__name__)
T = TypeVar("T")


class Topology(Protocol):
    where: str  # safe to log

    def find(self, name: bytes, deadline: float) -> Address:
        """The server with the key `name`.  Raises TierDown."""

    def distrust(self) -> None:
        """What is known may be outdated: ask again before the next answer."""
        return None

    def moved(self, error: ErrorReply) -> tuple[Address, bool] | None:
        """Where a refusal sends us, and whether only for this once (-ASK).  None: it is no redirect."""
        return None


class One(Topology):
    """A server that is always the same."""

    def __init__(self, url: RedisUrl) -> None:
        self._address = url.login
        self.where = url.login.where

    def find(self, name: bytes, deadline: float) -> Address:
        return self._address


class Master(Topology):
    """The master of a service, as the first Sentinel that answers names it."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._sentinels = list(url.addresses)
        self._master: Address | None = None
        self.where = f"service {url.service}"

    def find(self, name: bytes, deadline: float) -> Address:
        if known := self._master:
            return known
        self._sentinels, master = _first(self._sentinels, deadline, self._named)
        self._master = master
        return master

    def distrust(self) -> None:
        self._master = None

    def _named(self, sentinel: Address, timeout: float) -> Address:
        question = (b"SENTINEL", b"get-master-addr-by-name", self._url.service.encode())
        match _ask(sentinel, timeout, question):
            case [bytes(host), bytes(port)] if port.isdigit():
                return self._url.login.at(host.decode(), int(port))
            case ErrorReply() as refusal:
                raise TierDown(f"sentinel {sentinel.where}: {refusal.text}")
        raise TierDown(f"sentinel {sentinel.where} does not know service {self._url.service}")


class Cluster(Topology):
    """The slot map of a Cluster, from CLUSTER SLOTS of any node; masters only."""

    def __init__(self, url: RedisUrl) -> None:
        self._seeds = url.addresses
        self._login = url.login
        self._slots: list[Address | None] = []
        self._stale = True
        self.where = "cluster " + ",".join(address.where for address in url.addresses)

    def find(self, name: bytes, deadline: float) -> Address:
        if self._stale:
            self._learn(deadline)
        address = self._slots[key_slot(name)]
        if address is None:
            self._stale = True
            raise TierDown(f"redis {self.where}: no node serves slot {key_slot(name)}")
        return address

    def distrust(self) -> None:
        self._stale = True

    def moved(self, error: ErrorReply) -> tuple[Address, bool] | None:
        match error.text.split():
            case ["MOVED" | "ASK" as what, slot, target] if slot.isdigit() and int(slot) < SLOTS:
                host, _, port = target.rpartition(":")
                if not port.isdigit():
                    return None
                known = self._slots[int(slot)] or self._login
                address = self._login.at(host.strip("[]") or str(known.target[0]), int(port))
                self._stale |= what == "MOVED"  # a slot rarely moves alone
                return address, what == "ASK"
        return None

    def _learn(self, deadline: float) -> None:
        """Raises TierDown when nobody answers."""
        known = dict.fromkeys([*(address for address in self._slots if address), *self._seeds])
        _, self._slots = _first(list(known), deadline, self._drawn)
        self._stale = False

    def _drawn(self, node: Address, timeout: float) -> list[Address | None]:
        """One node's view.  Raises TierDown."""
        answer = _ask(node, timeout, (b"CLUSTER", b"SLOTS"))
        if isinstance(answer, ErrorReply):
            raise TierDown(f"redis {node.where}: {answer.text}")
        slots: list[Address | None] = [None] * SLOTS
        nodes: dict[Address, Address] = {}
        for part in answer if isinstance(answer, list) else ():
            match part:
                case [int(first), int(last), [host, int(port), *_], *_] if 0 <= first <= last < SLOTS:
                    name = host.decode() if isinstance(host, bytes) and host else str(node.target[0])
                    address = self._login.at(name, port)
                    address = nodes.setdefault(address, address)
                    slots[first : last + 1] = [address] * (last + 1 - first)
        if not 0 < len(nodes) <= _MAX_NODES:
            raise TierDown(f"redis {node.where}: a Cluster of {len(nodes)} nodes")
        return slots


KINDS: dict[str, Callable[[RedisUrl], Topology]] = {"single": One, "sentinel": Master, "cluster": Cluster}


def _ask(address: Address, timeout: float, question: Command) -> Reply:
    """One question on a connection of its own."""
    conn = Connection(address, timeout)
    try:
        conn.send(question)
        return conn.reply()
    finally:
        conn.close()


def _first(
    addresses: Iterable[Address], deadline: float, ask: Callable[[Address, float], T]
) -> tuple[list[Address], T]:
    """The first answer, and the addresses in the order to ask them next time.  Raises the last TierDown."""
    rest, silent = list(addresses), list[Address]()
    while True:
        address = rest[0]
        left = deadline - time.monotonic()
        try:
            answer = ask(address, min(_QUESTION_SECONDS, left / 2) if len(rest) > 1 else left)
        except TierDown:
            silent.append(rest.pop(0))
            if not rest:
                raise
            log.info("redis %s does not say where data is; asking another", address.where)
            continue
        return rest + silent, answer
