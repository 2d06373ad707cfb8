"""The connections of a tier, and the session in which one verb uses them.

A session keeps the order of commands and replies on each server, sends what goes to one server in one
piece, and follows a Cluster's redirects.  A connection leaves its session in step or closed.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cacheengine.errors import TierDown
from cacheengine.redis_url import Address, parse
from cacheengine.tiers.redis_nodes import KINDS
from cacheengine.tiers.resp import Command, Connection, ErrorReply, Reply

_BACKOFF_SECONDS = (0.1, 2.0)  # between attempts to connect to a server: first, longest
_REDIRECTS = 5  # followed for one command
# Refusals of a server that is, at the moment, not the one to ask.
_ELSEWHERE = {"READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN"}


class Pool:
    """At most `connections` sessions at a time, each with at most one connection to a server.

    Connections are made when needed.  Raises ConfigError for a URL it cannot use.
    """

    def __init__(self, url: str, connections: int) -> None:
        parsed = parse(url)
        self.topology = KINDS[parsed.kind](parsed)
        self.where = self.topology.where
        self._places = threading.Semaphore(connections)
        self._lock = threading.Lock()  # guards what follows
        self._idle: dict[Address, list[Connection]] = {}
        self._refused: dict[Address, tuple[float, float]] = {}  # not to be tried before; the pause after that
        self._closed = False

    @contextmanager
    def session(self, deadline: float) -> Iterator["Session"]:
        """Raises TierDown when all places are taken until `deadline` (time.monotonic seconds)."""
        if not self._places.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierDown(f"redis {self.where}: all connections are busy")
        try:
            if self._closed:
                raise TierDown(f"redis {self.where}: closed")
            session, whole = Session(self, deadline), False
            try:
                yield session
                whole = True
            except TierDown:
                whole = True  # whoever raised it has closed what was out of step
                raise
            finally:
                session.end(whole)
        finally:
            self._places.release()

    def close(self) -> None:
        """Sessions under way finish first or fail; whoever waits for one is told."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for conn in (conn for conns in idle.values() for conn in conns):
            conn.close()
        self._places.release()  # to one that waits, who passes it on

    def take(self, address: Address, deadline: float) -> Connection:
        """A connection in step.  Raises TierDown."""
        while conn := self._pop(address):
            conn.deadline = deadline
            if not conn.stale:
                return conn
            conn.close()
        with self._lock:
            retry_at, pause = self._refused.get(address, (0.0, _BACKOFF_SECONDS[0]))
        if time.monotonic() < retry_at:
            raise TierDown(f"redis {address.where}: waiting to reconnect")
        try:
            conn = Connection(address, deadline - time.monotonic())
        except TierDown:
            with self._lock:
                self._refused[address] = (time.monotonic() + pause, min(2 * pause, _BACKOFF_SECONDS[1]))
            raise
        with self._lock:
            self._refused.pop(address, None)
        return conn

    def give(self, address: Address, conn: Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.setdefault(address, []).append(conn)
                return
        conn.close()

    def _pop(self, address: Address) -> Connection | None:
        with self._lock:
            idle = self._idle.get(address)
            return idle.pop() if idle else None


@dataclass(slots=True, eq=False)
class _Lane:
    """One server's connection in a session: how many replies are due, and those read before their turn."""

    conn: Connection
    asked: int = 0
    answered: int = 0
    kept: dict[int, Reply] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A command under way."""

    lane: _Lane
    number: int
    name: bytes
    command: Command


class Session:
    """The connections of one verb, used by one thread.  Every method raises TierDown."""

    def __init__(self, pool: Pool, deadline: float) -> None:
        self._pool = pool
        self._deadline = deadline
        self._lanes: dict[Address, _Lane] = {}
        # key → its node, and whether it needs ASKING
        self._redirected: dict[bytes, tuple[Address, bool]] = {}
        self._doubt = False

    def ask(self, asks: Sequence[tuple[bytes, Command]]) -> list[Ticket]:
        """Send commands, each about the one key given with it; one piece for every server."""
        tickets: list[Ticket] = []
        outgoing: dict[_Lane, list[Command]] = {}
        for name, command in asks:
            known = self._redirected.get(name)
            address, once = known or (self._pool.topology.find(name, self._deadline), False)
            lane = self._lane(address)
            batch = outgoing.setdefault(lane, [])
            if once:
                batch.append((b"ASKING",))
                lane.asked += 1
            batch.append(command)
            tickets.append(Ticket(lane, lane.asked, name, command))
            lane.asked += 1
        for lane, batch in outgoing.items():
            lane.conn.send(*batch)
        return tickets

    def answers(self, tickets: Sequence[Ticket]) -> list[Reply]:
        """Their small replies, in order, after following what redirects there were."""
        replies = [self._reply(ticket) for ticket in tickets]
        for _ in range(_REDIRECTS):
            again = [i for i, reply in enumerate(replies) if self.follow(reply, tickets[i].name)]
            if not again:
                break
            retried = self.ask([(tickets[i].name, tickets[i].command) for i in again])
            for i, ticket in zip(again, retried, strict=True):
                replies[i] = self._reply(ticket)
        return replies

    def call(self, asks: Sequence[tuple[bytes, Command]]) -> list[Reply]:
        """ask() and answers()."""
        return self.answers(self.ask(asks))

    def bulk(self, ticket: Ticket) -> Connection:
        """The connection, about to say the reply to `ticket`, which the caller reads to its end."""
        lane = ticket.lane
        while lane.answered < ticket.number:
            lane.kept[lane.answered] = lane.conn.reply()
            lane.answered += 1
        lane.answered += 1
        return lane.conn

    def discard(self, tickets: Sequence[Ticket]) -> None:
        """Read bulk replies nobody wants any more."""
        for ticket in tickets:
            conn = self.bulk(ticket)
            length = conn.bulk_length()
            if isinstance(length, int):
                conn.skip(length)
                conn.end_bulk()

    def follow(self, reply: object, name: bytes) -> bool:
        """Whether `reply` is a redirect; then the next command about `name` goes where it says."""
        if not isinstance(reply, ErrorReply):
            return False
        self._doubt |= reply.code in _ELSEWHERE
        redirect = self._pool.topology.moved(reply)
        if redirect is not None:
            self._redirected[name] = redirect
        return redirect is not None

    def end(self, whole: bool) -> None:
        """Give back what is in step, close the rest; everything unless the verb was `whole`, since a bulk
        reply counts as answered before its bytes are read."""
        for address, lane in self._lanes.items():
            if whole and lane.answered == lane.asked and not lane.conn.closed and not self._doubt:
                self._pool.give(address, lane.conn)
            else:
                self._doubt |= lane.conn.closed
                lane.conn.close()
        if self._doubt:
            self._pool.topology.distrust()

    def _lane(self, address: Address) -> _Lane:
        lane = self._lanes.get(address)
        if lane is None:
            try:
                lane = self._lanes[address] = _Lane(self._pool.take(address, self._deadline))
            except TierDown:
                self._doubt = True
                raise
        return lane

    def _reply(self, ticket: Ticket) -> Reply:
        lane = ticket.lane
        while lane.answered <= ticket.number:
            lane.kept[lane.answered] = lane.conn.reply()
            lane.answered += 1
        return lane.kept.pop(ticket.number)
