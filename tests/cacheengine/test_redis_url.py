"""What a redis_url means, and the redis-py clients made from it."""

import asyncio
import ssl
from typing import Any

import pytest
import redis

from cacheengine.config import ConfigError
from cacheengine.redis_url import Address, async_client, client, parse, server_of


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address(("h", 6379))),
        ("redis://", Address(("127.0.0.1", 6379))),
        ("redis://h:1/2", Address(("h", 1), db=2)),
        ("redis://h:1?db=3", Address(("h", 1), db=3)),
        ("redis://:p%40%2F@h", Address(("h", 6379), "", "p@/")),
        ("redis://u:p@[::1]:7/0", Address(("::1", 7), "u", "p")),
        ("redis://[::1]", Address(("::1", 6379))),
        ("unix:///tmp/s?db=4", Address("/tmp/s", db=4)),
        ("unix://u:p@/tmp/s", Address("/tmp/s", "u", "p")),
        ("unix:///tmp/s?password=p&username=u", Address("/tmp/s", "u", "p")),
    ],
)
def test_a_url_says_where_who_and_which_database(url: str, address: Address):
    parsed = parse(url)
    assert (parsed.kind, parsed.login) == ("single", address)


def test_a_sentinel_url_names_sentinels_and_a_service_and_both_logins():
    found = parse("redis-sentinel://u:p@a,b:1,[::1]:2/kv/3?sentinel_username=su&sentinel_password=sp")
    assert (found.kind, found.service) == ("sentinel", "kv")
    assert found.addresses == tuple(
        Address(target, "su", "sp") for target in (("a", 26379), ("b", 1), ("::1", 2))
    )
    assert found.login.at("m", 9) == Address(("m", 9), "u", "p", 3)


def test_a_cluster_url_names_some_of_its_nodes():
    found = parse("redis-cluster://u:p@a,b:1")
    assert found.kind == "cluster"
    assert found.addresses == (Address(("a", 6379), "u", "p"), Address(("b", 1), "u", "p"))


@pytest.mark.parametrize("scheme", ["rediss", "rediss-sentinel", "rediss-cluster"])
def test_tls_checks_certificate_and_name_unless_told_otherwise(scheme: str):
    def context(query: str) -> ssl.SSLContext:
        found = parse(f"{scheme}://h/kv{query}" if "sentinel" in scheme else f"{scheme}://h{query}")
        assert all(address.tls is found.login.tls for address in found.addresses)
        assert found.login.tls is not None
        return found.login.tls

    assert (context("").verify_mode, context("").check_hostname) == (ssl.CERT_REQUIRED, True)
    assert not context("?ssl_check_hostname=false").check_hostname
    assert context("?ssl_check_hostname=false").verify_mode == ssl.CERT_REQUIRED
    assert context("?ssl_cert_reqs=none").verify_mode == ssl.CERT_NONE


def test_an_address_can_be_logged():
    assert "p4ss" not in repr(parse("redis-sentinel://u:p4ss@h/kv?sentinel_password=p4ss"))


@pytest.mark.parametrize(
    "url",
    [
        "", "h:1", "redis://h:x", "redis://h:0", "redis://h:99999", "redis://h/x", "unix://s", "unix://",
        "redis://a,b", "redis-sentinel://h", "redis-cluster://h/1", "redis-pigeon://h", "unix-cluster:///s",
        "rediss://h?ssl_cert_reqs=maybe", "rediss://h?ssl_ca_certs=/nowhere/ca", "rediss://h?ssl_certfile=/no",
    ],
)  # fmt: skip
def test_a_url_that_means_nothing_is_refused(url: str):
    with pytest.raises(ConfigError, match="redis_url"):
        parse(url)


@pytest.mark.parametrize("url", ["redis://u:p4ss@h:x", "http://u:p4ss@h", "redis-sentinel://u:p4ss@h"])
def test_a_refusal_never_repeats_the_password(url: str):
    with pytest.raises(ConfigError) as refused:
        parse(url)
    assert "p4ss" not in str(refused.value)


def works(made: redis.Redis) -> bool:
    with made:
        made.set("k", "v", ex=60)
        return made.get("k") == b"v"


def works_async(url: str) -> bool:
    async def ask() -> bool:
        async with async_client(url, socket_timeout=5.0, protocol=2) as made:
            await made.set("k", "v", ex=60)
            return await made.get("k") == b"v"

    return asyncio.run(ask())


def test_a_client_of_one_server(valkey: Any):
    for url in (valkey.url, valkey.unix_url):
        assert works(client(url, socket_timeout=5.0, protocol=2))
        assert works_async(url)


def test_a_client_over_tls(tls_server: Any):
    assert works(client(tls_server.tls_url, socket_timeout=5.0, protocol=2))
    assert works_async(tls_server.tls_url)


@pytest.mark.e2e
def test_a_client_of_the_master_that_sentinel_names(sentinels: Any):
    assert works(client(sentinels.url, socket_timeout=5.0, protocol=2))
    assert works_async(sentinels.url)
    with sentinels.master.client() as master:
        assert master.get("k") == b"v"


@pytest.mark.e2e
def test_a_client_of_a_cluster(cluster: Any):
    assert works(client(cluster.url, socket_timeout=5.0))
    assert works_async(cluster.url)


@pytest.mark.e2e
def test_every_key_of_a_cluster_has_a_server_of_its_own(cluster: Any):
    with client(cluster.url, socket_timeout=5.0) as made:
        servers = {id(server_of(made, f"{{{n}}}")) for n in range(50)}
        assert len(servers) == 3
        for n in range(20):
            assert server_of(made, f"{{{n}}}k").set(f"{{{n}}}k", n, ex=60)  # none says MOVED


def test_one_server_has_all_keys(valkey: Any):
    with client(valkey.url) as made:
        assert server_of(made, "k") is made
