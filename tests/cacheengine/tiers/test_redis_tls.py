"""The shared tier over TLS, and as a user who may do only what it needs."""

from contextlib import suppress
from typing import Any

import pytest
import redis

from cacheengine.errors import TierDown
from cacheengine.redis_url import parse
from cacheengine.tiers.resp import Connection
from tests.cacheengine.tiers.kit import blank, buffer, chunks, payload, redis_tier, ref, unlink

# of which docs/operations.md documents a superset: the index needs more
RIGHTS = ("~*@*@*@*", "+get", "+set", "+hset", "+exists", "+expire", "+unlink")


def test_large_values_pass_whole_through_tls(tls_server: Any):
    size = 5 << 20
    tls_server.flush()
    tier = redis_tier(tls_server.tls_url, payload_bytes=size, connections=1)
    refs, data = [ref(n) for n in range(3)], [payload(n, size) for n in range(3)]
    into = [buffer(size) for _ in range(3)]
    assert tier.write(refs, data) == 3
    assert tier.read(refs, into) == 3
    assert into == data
    tier.close()


def test_a_tls_connection_is_kept_between_calls(tls_server: Any):
    tls_server.flush()
    tier = redis_tier(tls_server.tls_url, connections=1)
    tier.prefix([ref(0)])
    with tls_server.client() as admin:
        before = admin.info("stats")["total_connections_received"]
        for _ in range(20):
            tier.prefix([ref(0)])
        assert admin.info("stats")["total_connections_received"] == before
    tier.close()


@pytest.mark.parametrize("scheme", ["rediss", "redis"], ids=["unknown authority", "no TLS"])
def test_a_server_that_cannot_be_trusted_is_down(tls_server: Any, scheme: str):
    tier = redis_tier(f"{scheme}://localhost:{tls_server.tls_port}", timeout_ms=500)
    with pytest.raises(TierDown):
        tier.prefix([ref(0)])
    tier.close()


def test_a_name_that_is_not_in_the_certificate_is_refused_unless_unchecked(tls_server: Any):
    url = f"rediss://127.1:{tls_server.tls_port}?ssl_ca_certs={tls_server.ca}"
    with pytest.raises(TierDown, match="CERTIFICATE_VERIFY_FAILED"):
        Connection(parse(url).login, 5)
    Connection(parse(url + "&ssl_check_hostname=false").login, 5).close()
    Connection(parse(f"rediss://127.1:{tls_server.tls_port}?ssl_cert_reqs=none").login, 5).close()


def test_a_client_certificate_is_shown_where_one_is_asked_for(tls_server: Any):
    with tls_server.client() as admin:
        admin.config_set("tls-auth-clients", "yes")
        try:
            stranger = redis_tier(tls_server.tls_url)
            with pytest.raises(TierDown):
                stranger.prefix([ref(0)])
            stranger.close()
            shown = f"&ssl_certfile={tls_server.cert}&ssl_keyfile={tls_server.key}"
            tier = redis_tier(tls_server.tls_url + shown)
            assert tier.write(*chunks(2)) == 2
            tier.close()
        finally:
            admin.config_set("tls-auth-clients", "optional")


def test_an_idle_tls_connection_notices_that_the_server_left(tls_server: Any):
    conn = Connection(parse(tls_server.tls_url).login, 5)
    conn.send((b"PING",))
    assert conn.reply() == b"PONG"
    assert not conn.stale
    with tls_server.client() as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    assert conn.stale
    conn.close()


def test_a_user_with_these_rights_can_do_everything(valkey: Any, admin: redis.Redis):
    admin.execute_command("ACL SETUSER", "cairn", "reset", "on", ">p/ss", *RIGHTS)
    try:
        tier = redis_tier(f"redis://cairn:p%2Fss@127.0.0.1:{valkey.port}")
        refs, data = chunks(4)
        assert tier.write(refs, data) == 4
        assert tier.write(refs, data) == 4
        assert tier.prefix(refs) == 4
        assert tier.read(refs, blank(4)) == 4
        unlink(tier, refs)
        assert tier.prefix(refs) == 0
        assert tier.stats.errors == 0
        tier.close()
    finally:
        admin.execute_command("ACL DELUSER", "cairn")


@pytest.mark.parametrize("missing", RIGHTS)
def test_a_user_without_one_of_the_rights_is_never_wrong(valkey: Any, admin: redis.Redis, missing: str):
    rights = [right for right in RIGHTS if right != missing]
    full = redis_tier(valkey.url)
    refs, data = chunks(4)
    full.write(refs[:2], data[:2])
    admin.execute_command("ACL SETUSER", "cairn", "reset", "on", ">p", *rights)
    try:
        tier = redis_tier(f"redis://cairn:p@127.0.0.1:{valkey.port}")
        into = blank(4)
        for verb in (tier.prefix, lambda refs: tier.read(refs, into), lambda refs: tier.write(refs, data)):
            with suppress(TierDown):
                assert verb(refs) <= 4
        assert into[0] in (data[0], buffer())
        tier.close()
    finally:
        admin.execute_command("ACL DELUSER", "cairn")
        full.close()
