"""One URL for every way Redis or Valkey is run, read the same way by the tier, the index and the launcher.

    redis://[user:pass@]host[:port][/db]                        one server; rediss:// with TLS
    unix://[user:pass@]/path[?db=0]                             one server, by its socket
    redis-sentinel://[user:pass@]h1[:26379],h2,h3/service[/db]  the master that Sentinel names
    redis-cluster://[user:pass@]h1[:6379],h2,h3                 a Cluster

rediss-sentinel:// and rediss-cluster:// are the same with TLS to every server.  Of the query, what redis-py
reads is read: db, username, password, ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs (none, optional,
required), ssl_check_hostname; and for Sentinels with a password of their own, sentinel_username and
sentinel_password.  Other redis-py options are left to redis-py.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.sentinel import Sentinel

from cacheengine.config import ConfigError

SCHEMES = "redis://, rediss://, unix://, redis-sentinel:// or redis-cluster://"
_PORTS = {"sentinel": 26379}
_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_FALSE = {"0", "f", "false", "n", "no"}  # as redis-py reads them

# What redis-py raises when servers do not answer; its Cluster has an exception of its own family.
DOWN = (redis.RedisError, redis.exceptions.RedisClusterException)


@dataclass(frozen=True, slots=True)
class Address:
    """One server and how to log in there.  `where` and the repr are safe to log: they have no password."""

    target: tuple[str, int] | str  # host and port, or the path of a unix socket
    user: str = ""
    password: str = field(default="", repr=False)
    db: int = 0
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)

    @property
    def where(self) -> str:
        return self.target if isinstance(self.target, str) else f"{self.target[0]}:{self.target[1]}"

    def at(self, host: str, port: int) -> "Address":
        """The same login at another server."""
        return replace(self, target=(host, port))


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a URL says.  `kind`: "single", "sentinel" or "cluster"."""

    kind: str
    addresses: tuple[Address, ...]  # the server; the Sentinels; some nodes of the Cluster
    login: Address  # of the servers with the data; its target counts for "single" only
    service: str = ""
    options: Mapping[str, str] = field(default_factory=dict, repr=False)  # ssl_* as given


def parse(url: str) -> RedisUrl:
    """Raises ConfigError; its text never contains the URL, which may hold a password.  Reads the certificates
    that the URL names."""
    try:
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        userinfo, _, netloc = parts.netloc.rpartition("@")
        hosts = [_host(host, _PORTS.get(parts.scheme.partition("-")[2], 6379)) for host in netloc.split(",")]
        path = [unquote(part) for part in parts.path.split("/") if part]
        service = path.pop(0) if parts.scheme.endswith("-sentinel") and path else ""
        db = int(query.get("db") or (parts.scheme != "unix" and path and path[0]) or 0)
    except ValueError:
        raise ConfigError("redis_url has a port or database that is not a number") from None
    scheme, _, kind = parts.scheme.partition("-")
    if scheme not in ("redis", "rediss", "unix") or kind not in ("", "sentinel", "cluster"):
        raise ConfigError(f"redis_url must start with {SCHEMES}")
    user, _, password = userinfo.partition(":")
    login = Address(
        unquote(parts.path) if scheme == "unix" else hosts[0],
        unquote(user) or query.get("username", ""),
        unquote(password) or query.get("password", ""),
        db,
        _context(query) if scheme == "rediss" else None,
    )
    options = {name: value for name, value in query.items() if name.startswith("ssl_")}
    if scheme == "unix":
        if not login.target or kind:
            raise ConfigError("redis_url must give the socket's absolute path: unix:///path")
        return RedisUrl("single", (login,), login)
    if kind == "sentinel":
        if not service:
            raise ConfigError("redis_url must name the service: redis-sentinel://host:26379/service")
        theirs = replace(
            login, user=query.get("sentinel_username", ""), password=query.get("sentinel_password", ""), db=0
        )
        return RedisUrl(kind, tuple(theirs.at(*host) for host in hosts), login, service, options)
    if kind == "cluster" and db:
        raise ConfigError("redis_url names a database, but a Cluster has only database 0")
    if not kind and len(hosts) > 1:
        raise ConfigError("redis_url names several hosts; write redis-sentinel:// or redis-cluster://")
    return RedisUrl(kind or "single", tuple(login.at(*host) for host in hosts), login, "", options)


def client(url: str, **options: Any) -> redis.Redis:
    """A blocking redis-py client, connected lazily except to a Cluster; it follows failovers.  `options` are
    redis-py's.  Raises ConfigError; for a Cluster also what redis-py raises when no node answers."""
    parsed = parse(url)
    if parsed.kind == "single":
        return redis.Redis.from_url(url, **options)
    options = _given(parsed) | options
    if parsed.kind == "cluster":
        nodes = [ClusterNode(*_target(address)) for address in parsed.addresses]  # type: ignore[no-untyped-call]
        # it has the verbs of Redis without being one
        return cast(redis.Redis, redis.RedisCluster(startup_nodes=nodes, **options))
    hosts = [_target(address) for address in parsed.addresses]
    sentinels: Any = _Sentinels(hosts, sentinel_kwargs=_theirs(parsed, options))  # type: ignore[no-untyped-call]
    return cast(redis.Redis, sentinels.master_for(parsed.service, **options, db=parsed.login.db))


def server_of(made: redis.Redis, name: str | bytes) -> redis.Redis:
    """The client of the one server that has the key `name`: pipelines and scripts then know of no Cluster.
    `made` is what client() returned.  Raises what redis-py raises where no node serves `name`."""
    if not isinstance(made, redis.RedisCluster):
        return made
    node = made.get_node_from_key(name)
    return cast(redis.Redis, made.get_redis_connection(node))


def servers_of(made: redis.Redis) -> list[redis.Redis]:
    """Clients of all servers with data, for what is asked of each (SCAN): the one, or a Cluster's masters.
    `made` is what client() returned."""
    if not isinstance(made, redis.RedisCluster):
        return [made]
    return [cast(redis.Redis, made.get_redis_connection(node)) for node in made.get_primaries()]


def async_client(url: str, **options: Any) -> redis.asyncio.Redis:
    """The same for asyncio, in every case connected lazily.  Raises ConfigError."""
    parsed = parse(url)
    if parsed.kind == "single":
        return redis.asyncio.Redis.from_url(url, **options)
    options = _given(parsed) | options
    if parsed.kind == "cluster":
        targets = [_target(address) for address in parsed.addresses]
        nodes = [AsyncClusterNode(host, port) for host, port in targets]
        return cast(redis.asyncio.Redis, redis.asyncio.RedisCluster(startup_nodes=nodes, **options))
    hosts = [_target(address) for address in parsed.addresses]
    theirs = _theirs(parsed, options)
    sentinels: Any = _AsyncSentinels(hosts, sentinel_kwargs=theirs)  # type: ignore[no-untyped-call]
    return cast(redis.asyncio.Redis, sentinels.master_for(parsed.service, **options, db=parsed.login.db))


def async_asker(url: str, seconds: float, **options: Any) -> redis.asyncio.Redis:
    """An async_client() for a question now and then: it waits so long at most, and asks again where the
    server has closed the connection while it was idle."""
    return async_client(
        url,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        retry=Retry(NoBackoff(), 1),
        protocol=2,
        **options,
    )


def async_node(url: str, host: str, port: int, **options: Any) -> redis.asyncio.Redis:
    """A client of one node of the Cluster that `url` names.  Raises ConfigError."""
    parsed = parse(url)
    if parsed.kind != "cluster":
        raise ConfigError("redis_url names no Cluster")
    return redis.asyncio.Redis(host=host, port=port, **(_given(parsed) | options))


class _Sentinels(Sentinel):
    """Hangs up on the Sentinels once they have answered; nobody else would."""

    def discover_master(self, service_name: str) -> Any:
        try:
            return super().discover_master(service_name)  # type: ignore[no-untyped-call]
        finally:
            for sentinel in self.sentinels:
                sentinel.close()


class _AsyncSentinels(AsyncSentinel):
    """Hangs up after each question: redis-py would keep these connections open for ever."""

    async def discover_master(self, service_name: str) -> Any:
        try:
            return await super().discover_master(service_name)
        finally:
            for sentinel in self.sentinels:
                await sentinel.aclose()


def _host(text: str, port: int) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]:port`.  Raises ValueError."""
    host, colon, given = text.rpartition(":")
    if not colon or given.endswith("]"):
        host, given = text, ""
    number = int(given) if given else port
    if not 0 < number < 1 << 16:
        raise ValueError(number)
    return host.strip("[]") or "127.0.0.1", number


def _context(query: Mapping[str, str]) -> ssl.SSLContext:
    """Raises ConfigError for certificates that cannot be read."""
    verify = _VERIFY.get(query.get("ssl_cert_reqs", "required"))
    if verify is None:
        raise ConfigError("redis_url: ssl_cert_reqs must be none, optional or required")
    try:
        context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
        if certificate := query.get("ssl_certfile"):
            context.load_cert_chain(certificate, query.get("ssl_keyfile"))
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"redis_url: cannot use its certificates ({exc.strerror})") from exc
    checked = query.get("ssl_check_hostname", "true").lower() not in _FALSE
    context.check_hostname = checked and verify != ssl.CERT_NONE
    context.verify_mode = verify
    return context


def _given(parsed: RedisUrl) -> dict[str, Any]:
    """A login as redis-py's options."""
    login, options = parsed.login, dict[str, Any](parsed.options)
    if "ssl_check_hostname" in options:
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() not in _FALSE
    if login.tls:
        options |= {"ssl": True}
        options.setdefault("ssl_check_hostname", login.tls.check_hostname)
    return options | {"username": login.user or None, "password": login.password or None}


def _theirs(parsed: RedisUrl, options: Mapping[str, Any]) -> dict[str, Any]:
    """What Sentinels are told: their own login, our timeouts and our TLS."""
    sentinel = parsed.addresses[0]
    kept = {name: value for name, value in options.items() if name.startswith(("ssl", "socket_"))}
    return kept | {"username": sentinel.user or None, "password": sentinel.password or None}


def _target(address: Address) -> tuple[str, int]:
    return cast(tuple[str, int], address.target)
