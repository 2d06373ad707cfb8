"""Workers that misbehave for longer than one request: who gets the next ones, and who does not."""

import asyncio
import contextlib
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from cacheengine.index_schema import FLEET, WorkerInfo, lease_name
from cacheengine.keys import KeyScheme, namespace_of, probe_keys
from gateway.health import FAULTS_IN_A_ROW
from tests.conftest import ValkeyServer
from tests.fakes import FakeVLLM, serve, slamming, wait_until
from tests.gateway.test_app import BODY, CHAT, STREAM, gateway, metric, quiet
from tests.gateway.test_patience import in_background, sent

pytestmark = pytest.mark.e2e

SCHEME = KeyScheme(namespace_of({"model": "m"}), 16)
SUBPROCESS = """
from tests.fakes import FakeVLLM, serve
with serve(FakeVLLM(tokens=10_000, gap=0.05)) as url:
    print(url, flush=True)
    input()
"""


def healths(client: httpx.Client) -> dict[str, str]:
    """URL → state of the breaker."""
    return {row["url"]: row["health"] for row in client.get("/admin/workers").json()["workers"]}


def posts(heard: list[bytes]) -> int:
    return sum(head.startswith(b"POST") for head in heard)


def calls(client: httpx.Client, times: int) -> list[int]:
    return [client.post(CHAT, json=BODY).status_code for _ in range(times)]


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_a_worker_that_drops_every_request_is_rested_and_nobody_notices(reset: bool) -> None:
    with (
        slamming(reset) as (bad, heard),
        serve(FakeVLLM()) as good,
        gateway(bad, good, policy="round_robin") as client,
    ):
        assert calls(client, 40) == [200] * 40
        assert healths(client)[good] == "closed"
        assert healths(client)[bad] in ("open", "half_open")
        assert FAULTS_IN_A_ROW <= posts(heard) <= 10  # with no breaker: 20
        assert metric(client, "cairn_gateway_retries_total") == posts(heard)
        shown = sum(
            metric(client, f'cairn_gateway_worker_health{{state="{state}",worker="{bad[7:]}"}}')
            for state in ("open", "half_open")
        )
        assert shown == 1


class Impatient(socketserver.StreamRequestHandler):
    """Answers one POST to a connection, and closes it in the moment of the next."""

    def handle(self) -> None:
        for answered in (False, True):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (line := self.rfile.readline()):
                    return
                head += line.lower()
            if head.startswith(b"get"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                return
            self.rfile.read(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
            if not answered:
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")


def test_the_only_worker_may_close_a_kept_connection_when_it_likes() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Impatient) as server:
        threading.Thread(target=server.serve_forever, name="impatient").start()
        try:
            with gateway(
                f"http://127.0.0.1:{server.server_address[1]}", connect_timeout_seconds=30
            ) as client:
                assert calls(client, 6) == [200] * 6
                assert metric(client, "cairn_gateway_retries_total") == 0
                unknown = [client.post("/v1/whatever", json=BODY).status_code for _ in range(6)]
                assert 502 in unknown, "nobody knows what it does: it is not done twice"
        finally:
            server.shutdown()


def test_a_worker_of_500s_is_rested_and_its_answers_are_relayed_until_then() -> None:
    broken = FakeVLLM(status=500)
    with serve(broken) as bad, serve(FakeVLLM()) as good, gateway(bad, good, policy="round_robin") as client:
        statuses = calls(client, 40)
        assert statuses.count(500) == len(broken.asked) <= 10
        assert healths(client)[bad] in ("open", "half_open")


def test_a_worker_that_is_well_again_is_found_out_by_one_request() -> None:
    broken = FakeVLLM(status=500)
    with serve(broken) as bad, serve(FakeVLLM()) as good, gateway(bad, good, policy="round_robin") as client:
        calls(client, 2 * FAULTS_IN_A_ROW)
        assert healths(client)[bad] == "open"
        broken.status = 200
        wait_until(lambda: calls(client, 1) == [200] and healths(client)[bad] == "closed", 60)


def test_requests_that_are_wrong_in_themselves_rest_nobody() -> None:
    for status in (400, 404, 422, 429):
        wrong = FakeVLLM(status=status)
        with serve(wrong) as a, serve(wrong) as b, gateway(a, b) as client:
            assert set(calls(client, 30)) == {status}
            assert set(healths(client).values()) == {"closed"}


def test_clients_that_hang_up_rest_nobody() -> None:
    slow = FakeVLLM(gap=60)
    with serve(slow) as a, serve(slow) as b, gateway(a, b) as client:
        for n in range(1, 3 * FAULTS_IN_A_ROW):
            with sent(client, BODY):
                wait_until(lambda n=n: len(slow.asked) == n)
        wait_until(lambda: quiet(client))
        assert set(healths(client).values()) == {"closed"}


def test_when_all_are_bad_somebody_still_gets_requests_and_retries_are_few() -> None:
    with slamming() as (a, x), slamming() as (b, y), slamming() as (c, z), gateway(a, b, c) as client:
        assert set(calls(client, 60)) == {502}
        assert posts(x + y + z) >= 60
        denied = metric(client, "cairn_gateway_retries_denied_total")
        assert denied > 0
        # 10 in reserve, 6 earned by 60 requests, and some by time
        assert posts(x + y + z) == 60 + metric(client, "cairn_gateway_retries_total")
        assert metric(client, "cairn_gateway_retries_total") + denied == 60


def test_a_silent_worker_costs_each_request_a_timeout_only_until_it_is_rested() -> None:
    hung = FakeVLLM(gap=60)
    with (
        serve(hung) as bad,
        serve(FakeVLLM()) as good,
        gateway(bad, good, policy="round_robin", first_byte_timeout_seconds=0.3) as client,
    ):
        statuses = calls(client, 30)
        assert statuses.count(504) <= 10
        assert healths(client)[bad] in ("open", "half_open")


class Leased:
    """A worker's lease as its engine would keep it, written by hand."""

    def __init__(self, valkey: ValkeyServer, worker_id: str, url: str) -> None:
        self._valkey, self._beat_ms = valkey, 1.0
        self._info = WorkerInfo(
            worker_id,
            url,
            "fake",
            "/none",
            SCHEME.namespace.hex(),
            16,
            tuple(probe_keys(SCHEME)),
            boot_id="1",
        )

    def beat(self, seconds: float = 1.0, **load: float) -> None:
        """The next heartbeat, `seconds` after the one before."""
        self._beat_ms += 1000 * seconds
        info = self._info
        beat = {name: str(value) for name, value in {**load, "beat_ms": self._beat_ms}.items()}
        with self._valkey.client() as redis:
            redis.hset(lease_name(info.namespace, info.worker_id), mapping=info.fields() | beat)
            redis.zadd(FLEET, {f"{info.namespace}:{info.worker_id}": 1})


@pytest.fixture
def leased(valkey: ValkeyServer) -> Callable[[str, str], Leased]:
    return lambda worker_id, url: Leased(valkey, worker_id, url)


def state_of(client: httpx.Client, worker_id: str) -> tuple[str, str]:
    rows = client.get("/admin/workers").json()["workers"]
    return next((row["state"], row["health"]) for row in rows if row["id"] == worker_id)


def test_an_engine_that_computes_nothing_gets_no_more_until_it_does(
    valkey: ValkeyServer, leased: Callable[[str, str], Leased]
) -> None:
    one, two = FakeVLLM(), FakeVLLM()
    with serve(one) as a, serve(two) as b:
        stuck, well = leased("stuck", a), leased("well", b)

        def both(seconds: float, tokens: float = 100) -> None:
            stuck.beat(seconds, running=3, computed_tokens=tokens)
            well.beat(seconds, running=3, computed_tokens=stuck._beat_ms)

        both(0)
        with gateway(redis_url=valkey.url, index_deadline_ms=1000, policy="round_robin") as client:

            def after(beat: float, tokens: float, health: str) -> None:
                def seen() -> bool:
                    both(beat, tokens)
                    return state_of(client, "stuck") == ("ready", health)

                wait_until(seen, 30)

            both(1)
            assert state_of(client, "stuck") == ("ready", "closed")
            after(30, 100, "wedged")
            assert metric(client, 'cairn_gateway_worker_health{state="wedged",worker="stuck"}') == 1
            assert state_of(client, "well") == ("ready", "closed")
            before = len(one.asked)
            assert calls(client, 10) == [200] * 10
            assert len(one.asked) == before
            after(1, 101, "closed")
            assert calls(client, 4) == [200] * 4
            assert len(one.asked) > before


def test_the_last_worker_is_asked_though_it_is_wedged(
    valkey: ValkeyServer, leased: Callable[[str, str], Leased]
) -> None:
    with serve(FakeVLLM()) as a:
        only = leased("only", a)
        only.beat(running=1, computed_tokens=7)
        with gateway(redis_url=valkey.url, index_deadline_ms=1000) as client:

            def wedged() -> bool:
                only.beat(100, running=1, computed_tokens=7)
                return state_of(client, "only")[1] == "wedged"

            wait_until(wedged, 30)
            assert calls(client, 2) == [200] * 2


def test_an_engine_whose_heartbeats_do_not_come_is_not_called_wedged(
    valkey: ValkeyServer, leased: Callable[[str, str], Leased]
) -> None:
    with serve(FakeVLLM()) as a, serve(FakeVLLM()) as b:
        leased("late", a).beat(running=1, computed_tokens=7)
        stuck = leased("stuck", b)
        stuck.beat(running=1, computed_tokens=7)
        with gateway(redis_url=valkey.url, index_deadline_ms=1000, wedge_seconds=0.001) as client:

            def wedged() -> bool:
                stuck.beat(running=1, computed_tokens=7)
                return state_of(client, "stuck")[1] == "wedged"

            wait_until(wedged, 30)
            assert state_of(client, "late")[1] == "closed"


@contextlib.contextmanager
def another_process() -> Iterator[tuple[str, int]]:
    """A worker that can be frozen: its URL and pid."""
    command = [sys.executable, "-c", SUBPROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip(), process.pid
        finally:
            process.kill()


def test_a_server_that_freezes_behind_a_fresh_lease_is_found_out(
    valkey: ValkeyServer, leased: Callable[[str, str], Leased]
) -> None:
    with another_process() as (a, pid), serve(FakeVLLM()) as b:
        frozen = leased("frozen", a)
        frozen.beat(running=0, computed_tokens=7)
        with gateway(redis_url=valkey.url, index_deadline_ms=1000, wedge_seconds=0.5) as client:
            with client.stream("POST", CHAT, json=STREAM) as reply:
                chunks = reply.iter_raw()
                next(chunks)
                leased("other", b).beat(running=0, computed_tokens=7)
                wait_until(lambda: client.get("/health/ready").json()["workers"] == 2, 30)
                os.kill(pid, signal.SIGSTOP)
                wait_until(lambda: state_of(client, "frozen")[0] == "down", 60)
                assert calls(client, 4) == [200] * 4
                os.kill(pid, signal.SIGCONT)
                wait_until(lambda: state_of(client, "frozen")[0] == "ready", 60)
            wait_until(lambda: quiet(client))


@dataclass
class Dying(FakeVLLM):
    """Breaks off when it is told to, and before its first word."""

    told: bool = False

    async def _generate(self, ask: dict[str, Any], send: Any) -> None:
        while not self.told:
            await asyncio.sleep(0.005)
        self.die_after = 0
        await super()._generate(ask, send)


def test_a_retry_does_not_go_to_a_worker_that_was_drained_meanwhile() -> None:
    houses = [Dying(), Dying()]
    with serve(houses[0]) as a, serve(houses[1]) as b, gateway(a, b) as client:
        replies: list[httpx.Response] = []
        waiting = in_background(client, replies, stream=True)
        wait_until(lambda: houses[0].running + houses[1].running)
        other = b if houses[0].running else a
        assert client.post(f"/admin/workers/{other[7:]}/drain").status_code == 200
        for house in houses:
            house.told = True
        waiting.join()
        assert [reply.status_code for reply in replies] == [502]
        assert sum(len(house.asked) for house in houses) == 1
