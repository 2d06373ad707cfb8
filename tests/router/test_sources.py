"""Sources of workers, each alone."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from router import sources
from router.sources import DNS_SECONDS, Dns, DnsName, SourceDown, Static, WorkersFile, parse_worker
from router.worker import StaticWorker, Worker


def urls(workers: list[Worker]) -> list[str]:
    return [worker.url for worker in workers]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("m=http://h:1", StaticWorker("http://h:1", "m")),
        ("org/m=https://h/", StaticWorker("https://h", "org/m")),
        ("m=http://[::1]:8001", StaticWorker("http://[::1]:8001", "m")),
        ("m=dns://svc.ns:8000", DnsName("svc.ns", 8000, "m")),
    ],
)
def test_a_worker_is_named_with_its_model(text: str, meant: object) -> None:
    assert parse_worker(text) == meant


@pytest.mark.parametrize("text", ["http://h:1", "m=h:1", "m=dns://svc", "m=http://h/v1/x", ""])
def test_what_is_no_worker_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match="should read model=http"):
        parse_worker(text)


@pytest.mark.parametrize(
    "text", ["m=http://c:8O00", "m=http://c:99999", "m=dns://a..b:80", "m=dns://h:0", "m=dns://h:99999"]
)
def test_a_host_or_port_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="of a worker"):
        parse_worker(text)


@pytest.mark.parametrize(
    "text", ["m=http://user:hunter2@h:1", "m=dns://user:hunter2@h:1", "m=ftp://hunter2@h", "hunter2"]
)
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="should read model=http") as refused:
        parse_worker(text)
    assert "hunter2" not in str(refused.value)


def test_static_workers_are_those_of_the_configuration() -> None:
    assert urls(asyncio.run(Static([StaticWorker("http://h:1/", "m")]).read())) == ["http://h:1"]


class Names:
    """A name server and a clock."""

    def __init__(self) -> None:
        self.now, self.asked = 100.0, 0
        self.addresses: list[str] | None = ["10.0.0.2", "10.0.0.1"]
        self.silent = False

    async def resolve(self, host: str, port: int) -> list[str]:
        assert (host, port) == ("svc", 80)
        self.asked += 1
        while self.silent:
            await asyncio.sleep(0.001)
        if self.addresses is None:
            raise OSError("no such name")
        return self.addresses


def told(job: Callable[[Names, Dns], Awaitable[None]]) -> None:
    async def main() -> None:
        names = Names()
        await job(names, Dns(DnsName("svc", 80, "m"), names.resolve, lambda: names.now))

    asyncio.run(main())


def test_every_address_of_a_name_is_a_worker_and_the_name_is_asked_again_after_a_while() -> None:
    async def job(names: Names, dns: Dns) -> None:
        assert urls(await dns.read()) == ["http://10.0.0.1:80", "http://10.0.0.2:80"]
        names.addresses = ["10.0.0.3", "10.0.0.2", "10.0.0.3"]
        assert len(await dns.read()) == 2
        assert names.asked == 1
        names.now += DNS_SECONDS
        workers = await dns.read()
        assert urls(workers) == ["http://10.0.0.2:80", "http://10.0.0.3:80"]
        assert {worker.model for worker in workers} == {"m"}
        assert names.asked == 2

    told(job)


def test_a_worker_with_addresses_of_two_families_is_one_worker() -> None:
    async def job(names: Names, dns: Dns) -> None:
        names.addresses = ["fd00::1", "fd00::2", "10.0.0.1", "10.0.0.2"]
        assert urls(await dns.read()) == ["http://[fd00::1]:80", "http://[fd00::2]:80"]
        names.addresses = ["10.0.0.2", "fd00::2", "fd00::1", "10.0.0.1"]  # all would have new names
        names.now += DNS_SECONDS
        assert urls(await dns.read()) == ["http://[fd00::1]:80", "http://[fd00::2]:80"]
        names.addresses = ["10.0.0.2", "10.0.0.1"]
        names.now += DNS_SECONDS
        assert urls(await dns.read()) == ["http://10.0.0.1:80", "http://10.0.0.2:80"]
        names.addresses = []
        names.now += DNS_SECONDS
        assert await dns.read() == []

    told(job)


def test_a_name_that_does_not_resolve_is_a_source_that_is_down() -> None:
    async def job(names: Names, dns: Dns) -> None:
        names.addresses = None
        with pytest.raises(SourceDown, match="no such name"):
            await dns.read()

    told(job)


def test_a_name_that_cannot_be_encoded_is_a_source_that_is_down() -> None:
    with pytest.raises(SourceDown, match=r"a\.\.b"):
        asyncio.run(Dns(DnsName("a..b", 80, "m")).read())


def test_a_silent_name_server_is_asked_once_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DNS_PATIENCE", 0.01)

    async def job(names: Names, dns: Dns) -> None:
        names.silent = True
        for _ in range(3):
            with pytest.raises(SourceDown, match="no answer"):
                await dns.read()
            names.now += DNS_SECONDS
        assert names.asked == 1
        names.silent = False
        while not (dns._asking and dns._asking.done()):
            await asyncio.sleep(0.001)
        assert len(await dns.read()) == 2  # however late it came
        assert names.asked == 1

    told(job)


def test_the_systems_resolver_knows_localhost() -> None:
    workers = asyncio.run(Dns(DnsName("localhost", 8000, "m")).read())
    assert {worker.url for worker in workers} & {"http://127.0.0.1:8000", "http://[::1]:8000"}


def rewrite(path: Path, text: str) -> None:
    """As editors and orchestrators do: another file under the same name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text("- m=http://a:1\n- m=http://b:1\n")
    file = WorkersFile(path)
    assert urls(asyncio.run(file.read())) == ["http://a:1", "http://b:1"]
    rewrite(path, '["m=http://c:1/"]')  # JSON is YAML
    assert urls(asyncio.run(file.read())) == ["http://c:1"]
    rewrite(path, "[]")
    assert asyncio.run(file.read()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody",
        "a: [",
        "workers: []",
        "- 5",
        "- m=ftp://a",
        "- m=dns://a:1",
        "- m=http://a:8O",
        "\x00",
        "- !!python/object:os.x {}",
    ],
)
def test_a_file_that_makes_no_sense_is_a_source_that_is_down_and_says_so_once(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(text)
    file = WorkersFile(path)
    for _ in range(2):
        with pytest.raises(SourceDown, match=r"workers\.yaml"):
            asyncio.run(file.read())
    assert len(caplog.records) == 1
    rewrite(path, "- m=http://a:1")
    assert urls(asyncio.run(file.read())) == ["http://a:1"]


def test_a_file_that_is_not_there_yet_is_a_source_that_is_down(tmp_path: Path) -> None:
    with pytest.raises(SourceDown):
        asyncio.run(WorkersFile(tmp_path / "later.yaml").read())
