"""Real processes: reload, restart and shutdown while callers are being answered; several on one port; TLS."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes import FakeVLLM, serve, wait_until
from tests.gateway.process import Gateway, started
from tests.servers import _certificates, free_port, needed

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
STREAMS = 50


@contextlib.contextmanager
def streams(gateway: Gateway, worker: FakeVLLM, count: int = STREAMS) -> Iterator[list[bytes]]:
    """So many answers under way in the body of the `with`; after it, what each caller was told."""
    told: list[bytes] = []

    async def one(client: httpx.AsyncClient) -> None:
        reply = await client.post(CHAT, json={**BODY, "stream": True})
        told.append(reply.content if reply.status_code == 200 else b"refused")

    async def all_of_them() -> None:
        url = f"http://127.0.0.1:{gateway.port}"
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as client:
            await asyncio.gather(*(one(client) for _ in range(count)))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    try:
        wait_until(lambda: worker.running == count, 60)
        yield told
    finally:
        worker.gap = 0.0  # the rest of every answer at once
        thread.join(120)


@contextlib.contextmanager
def knocking(gateway: Gateway) -> Iterator[list[str]]:
    """New connections all the time; yields what went wrong."""
    wrong: list[str] = []
    over = threading.Event()

    def knock() -> None:
        while not over.wait(0.005):
            try:
                status = gateway.get("/health/live").status_code
                if status != 200:
                    wrong.append(str(status))
            except httpx.TransportError as exc:
                wrong.append(repr(exc))

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join(60)


def slow() -> FakeVLLM:
    return FakeVLLM(tokens=2000, gap=0.05)


def whole(told: list[bytes]) -> bool:
    return len(told) == STREAMS and all(
        answer.count(b"word") == 2000 and answer.endswith(b"data: [DONE]\n\n") for answer in told
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reload_cuts_no_stream_and_refuses_nobody(tmp_path: Path, processes: int) -> None:
    with serve(worker := slow()) as url, started(tmp_path, f"fake={url}", processes=processes) as gateway:
        with streams(gateway, worker) as told, knocking(gateway) as wrong:
            before = set(gateway.serving())
            os.kill(gateway.pid, signal.SIGHUP)
            wait_until(lambda: b"reloaded" in gateway.log.read_bytes(), 60)
            assert not before & set(gateway.serving()) or worker.running == STREAMS
            assert worker.running == STREAMS
            assert gateway.get("/admin/workers").status_code == 200
        assert whole(told)
        assert wrong == []
        wait_until(lambda: not before & set(gateway.serving()), 60)
        assert len(gateway.serving()) == processes


def test_a_shutdown_lets_open_streams_finish(tmp_path: Path) -> None:
    with serve(worker := slow()) as url, started(tmp_path, f"fake={url}", processes=2) as gateway:
        with streams(gateway, worker) as told:
            os.kill(gateway.pid, signal.SIGTERM)
            wait_until(lambda: not accepted(gateway), 60)
            assert worker.running == STREAMS
        assert whole(told)
        wait_until(lambda: not Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text(), 60)


def accepted(gateway: Gateway) -> bool:
    """Does anybody answer a new connection within a moment?"""
    try:
        httpx.get(f"http://127.0.0.1:{gateway.port}/health/live", timeout=1, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def test_a_bad_configuration_is_refused_with_a_line_and_the_old_one_stays(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text("max_inflight: 7\n")
    with serve(FakeVLLM()) as url, started(tmp_path, f"fake={url}", config=str(config)) as gateway:
        before = gateway.serving()
        for bad in ("max_inflight: many\n", "tls_cert: /no/such/file\n"):
            config.write_text(bad)
            said = gateway.log.read_bytes().count(b"stays as it was")
            os.kill(gateway.pid, signal.SIGHUP)
            wait_until(lambda: gateway.log.read_bytes().count(b"stays as it was") > said, 60)  # noqa: B023
            wait_until(lambda: gateway.serving() == before, 60)
        assert gateway.get("/health/ready").status_code == 200
        config.write_text("max_inflight: 8\naliases: [other=fake]\n")
        os.kill(gateway.pid, signal.SIGHUP)
        wait_until(lambda: b"reloaded" in gateway.log.read_bytes(), 60)
        wait_until(lambda: "other" in gateway.get("/v1/models").text, 60)


def test_a_process_that_dies_is_started_again_and_nobody_is_refused(tmp_path: Path) -> None:
    with serve(FakeVLLM()) as url, started(tmp_path, f"fake={url}", processes=2) as gateway:
        wait_until(lambda: b"every process serves" in gateway.log.read_bytes(), 60)
        victim = gateway.serving()[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(gateway.serving()) == 2 and victim not in gateway.serving(), 60)
        for _ in range(20):  # some wait for the new one
            assert gateway.get("/health/live").status_code == 200


def test_whoever_of_several_is_asked_tells_of_all(tmp_path: Path) -> None:
    with serve(worker := FakeVLLM()) as url, started(tmp_path, f"fake={url}", processes=2) as gateway:
        for _ in range(40):
            with httpx.Client(trust_env=False, timeout=30) as client:  # a connection of its own
                assert client.post(f"http://127.0.0.1:{gateway.port}{CHAT}", json=BODY).status_code == 200
        name = f'cairn_gateway_requests_total{{model="fake",route="{CHAT}",status="200"}} '
        for _ in range(10):
            lines = gateway.get("/metrics").text.splitlines()
            assert [float(line.removeprefix(name)) for line in lines if line.startswith(name)] == [40]
        worker.gap, worker.tokens = 0.05, 2000
        with streams(gateway, worker, 12):
            assert {gateway.get("/admin/workers").json()["inflight"] for _ in range(10)} == {12}
            rows = [gateway.get("/admin/workers").json()["workers"] for _ in range(10)]
            assert {row["inflight"] for (row,) in rows} == {12}
        wait_until(lambda: gateway.get("/admin/workers").json()["inflight"] == 0)
        (row,) = gateway.get("/admin/workers").json()["workers"]
        assert (
            httpx.post(f"http://127.0.0.1:{gateway.port}/admin/workers/{row['id']}/drain").status_code == 200
        )
        for _ in range(10):
            (row,) = gateway.get("/admin/workers").json()["workers"]
            assert row["state"] == "drained"


def test_a_port_somebody_else_has_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = json.dumps({"port": taken.getsockname()[1]})
        argv = [sys.executable, "-m", "gateway.launch.serve", flags]
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "cannot listen on 127.0.0.1:" in ran.stderr


def test_tls_on_both_sides(tmp_path: Path) -> None:
    _certificates(needed(shutil.which("openssl"), "openssl"), tmp_path)
    ca, cert, key = (str(tmp_path / name) for name in ("ca.crt", "tls.crt", "tls.key"))
    knobs = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca, "workers_ca": ca}
    known = ssl.create_default_context(cafile=ca)
    known.load_cert_chain(cert, key)
    old = ssl.create_default_context(cafile=ca)
    old.load_cert_chain(cert, key)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with serve(FakeVLLM(), ssl_certfile=cert, ssl_keyfile=key) as worker:
        url = worker.replace("http://127.0.0.1", "https://localhost")
        with process(tmp_path, {"workers": [f"fake={url}"], **knobs}) as base:
            with httpx.Client(base_url=base, verify=known, trust_env=False, timeout=30) as client:
                wait_until(lambda: answers(client), 60)
                assert client.post(CHAT, json=BODY).status_code == 200
            for context in (ssl.create_default_context(cafile=ca), ssl.create_default_context(), old):
                with (
                    pytest.raises(httpx.TransportError),
                    httpx.Client(base_url=base, verify=context, trust_env=False) as stranger,
                ):
                    stranger.get("/health")
        knobs["workers_ca"] = ""  # the system knows nothing of this authority
        with (
            process(tmp_path, {"workers": [f"fake={url}"], **knobs}) as base,
            httpx.Client(base_url=base, verify=known, trust_env=False, timeout=30) as client,
        ):
            wait_until(lambda: ready_status(client) == 503, 60)
            assert client.post(CHAT, json=BODY).status_code == 503


def answers(client: httpx.Client) -> bool:
    return ready_status(client) == 200


def ready_status(client: httpx.Client) -> int:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health/ready").status_code
    return 0


@contextlib.contextmanager
def process(folder: Path, knobs: dict[str, object]) -> Iterator[str]:
    port = free_port()
    argv = [sys.executable, "-m", "gateway.launch.serve", json.dumps({"port": port, **knobs})]
    with (folder / "log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as running:
        try:
            yield f"https://localhost:{port}"
        finally:
            running.terminate()
            running.wait(60)


def test_a_shell_s_limit_of_open_files_is_not_ours(tmp_path: Path) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, most), most))
    try:
        with serve(FakeVLLM()) as url, started(tmp_path, f"fake={url}") as gateway:
            told = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in gateway.serving()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    assert told == [(most, most)]
