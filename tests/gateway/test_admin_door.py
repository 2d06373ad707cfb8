"""The admin pages: behind their token, on a port of their own, not open to other machines by default."""

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


def test_keys_need_a_place_to_be_kept() -> None:
    with pytest.raises(ConfigError, match="redis_url, or a keys_file"):
        GatewayConfig.load(env={}, auth="keys")
