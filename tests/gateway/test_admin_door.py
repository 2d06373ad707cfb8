"""The admin pages: behind their token, on a port of their own, not open to other machines by default."""

import socket
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from cacheengine.config import ConfigError
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.launch.errors import LaunchError
from gateway.launch.status import fetch_workers
from tests.fakes import serve
from tests.servers import free_port

PAGES = ("/admin/workers", "/admin/tenants", "/admin/decisions", "/admin/state")


def get(url: str, token: str = "") -> int:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.get(url, headers=headers, trust_env=False, timeout=30).status_code


@pytest.mark.e2e
def test_every_admin_page_asks_for_the_token_and_status_knows_it() -> None:
    with serve(create_app(GatewayConfig(admin_token=SecretStr("right")))) as url:
        for page in PAGES:
            assert [get(url + page, token) for token in ("", "wrong", "right")] == [401, 401, 200], page
        assert get(f"{url}/health") == 200
        assert fetch_workers(url, SecretStr("right")) == []
        with pytest.raises(LaunchError, match="CAIRN_ADMIN_TOKEN"):
            fetch_workers(url)


@pytest.mark.e2e
def test_with_a_port_of_their_own_they_are_nowhere_else() -> None:
    port = free_port()
    with serve(create_app(GatewayConfig(admin_port=port))) as url:
        for page in PAGES:
            assert get(url + page) == 404, page
            assert get(f"http://127.0.0.1:{port}{page}") == 200, page
        for page in ("/metrics", "/health"):
            assert get(url + page) == get(f"http://127.0.0.1:{port}{page}") == 200
        with pytest.raises(LaunchError, match="CAIRN_ADMIN_PORT"):
            fetch_workers(url)
    with pytest.raises(httpx.ConnectError):
        get(f"http://127.0.0.1:{port}/health")


ELSEWHERE = (
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
)


@pytest.mark.e2e
@pytest.mark.parametrize("token", ["", "right"])
def test_no_order_is_taken_from_somebody_elses_web_page(token: str) -> None:
    worker = "10.0.0.1:8000"
    config = GatewayConfig(workers=[f"fake=http://{worker}"], admin_token=SecretStr(token))
    with serve(create_app(config)) as url:
        known = {"authorization": f"Bearer {token}"} if token else {}

        def order(said: dict[str, str], method: str = "POST", path: str = "/drain") -> int:
            asked = f"{url}/admin/workers/{worker}{path}"
            return httpx.request(method, asked, headers=known | said, trust_env=False, timeout=30).status_code

        def draining() -> bool:
            asked = httpx.get(f"{url}/admin/workers", headers=known, trust_env=False, timeout=30)
            return "drain" in asked.json()["workers"][0]["state"]

        for said in ELSEWHERE:
            assert [order(said), order(said, "DELETE", "")] == [403, 403], said
            assert not draining(), said
        for said in ({"sec-fetch-site": "same-origin", "origin": "https://proxy"}, {"origin": url}, {}):
            assert order(said, path="/resume") == order(said) == 200, said
            assert draining(), said


@pytest.mark.e2e
def test_a_name_that_was_made_to_point_here_reads_nothing_unless_it_knows_the_token() -> None:
    def asked(url: str, page: str, host: str) -> int:
        return httpx.get(url + page, headers={"host": host}, trust_env=False, timeout=30).status_code

    with serve(create_app(GatewayConfig())) as url:
        for page in (*PAGES, "/dashboard"):
            for host in (
                "evil.example",
                "evil.example:8000",
                "127.0.0.1.evil.example",
                "localhost.evil",
                "[::1",
            ):
                assert asked(url, page, host) == 403, (page, host)
            for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "10.0.0.9:80", "cairn.localhost"):
                assert asked(url, page, host) == 200, (page, host)
    with serve(create_app(GatewayConfig(admin_token=SecretStr("right")))) as url:
        assert asked(url, "/dashboard", "cairn.example") == 200
        named = {"authorization": "Bearer right", "host": "cairn.example"}
        reply = httpx.get(f"{url}/admin/state", headers=named, trust_env=False, timeout=30)
        assert reply.status_code == 200


@pytest.mark.e2e
def test_the_admin_port_bounds_its_callers_like_the_other() -> None:
    port = free_port()
    with serve(create_app(GatewayConfig(admin_port=port, receive_timeout_seconds=0.5))):
        large = {"x": "y" * (100 << 10)}
        reply = httpx.get(f"http://127.0.0.1:{port}/health", headers=large, trust_env=False, timeout=30)
        assert reply.status_code == 431
        with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.9", "gateway.internal"])
def test_beyond_loopback_they_need_a_port_of_their_own(host: str) -> None:
    with pytest.raises(ConfigError, match="admin_port"):
        GatewayConfig.load(env={}, host=host)
    assert GatewayConfig.load(env={}, host=host, admin_port=8100).admin_host == "127.0.0.1"
    with_token = GatewayConfig.load(env={"CAIRN_ADMIN_TOKEN": "t"}, host=host, admin_port=8100)
    assert with_token.admin_host == host
    assert "CAIRN" not in repr(with_token)
    assert "'t'" not in repr(with_token)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_on_loopback_they_share_the_port(host: str) -> None:
    assert GatewayConfig.load(env={}, host=host).admin_port == 0


@pytest.mark.parametrize(
    ("host", "auth", "told"), [("0.0.0.0", "off", 1), ("0.0.0.0", "keys", 0), ("127.0.0.1", "off", 0)]
)
def test_a_gateway_that_anybody_may_call_says_so(
    host: str, auth: Any, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    create_app(GatewayConfig(host=host, admin_port=8100, auth=auth, keys_file="keys.yaml"))
    assert caplog.text.count("set auth to keys") == told


def test_keys_need_a_place_to_be_kept() -> None:
    with pytest.raises(ConfigError, match="redis_url, or a keys_file"):
        GatewayConfig.load(env={}, auth="keys")
