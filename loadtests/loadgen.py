"""One HTTP question asked many times, by a native client that is faster than what it asks.

loadgen_cpp/ is one thread on epoll over raw HTTP/1.1.  It measures, per request: the time to the first body
byte, and in streams the gaps between reads that brought events.  Closed loop: each connection asks again as
soon as it is answered.  Open loop (`rate`): requests are due at exponential intervals and their times count
from when they were due.  `aborts` is the share of requests whose connection is closed before the eighth
event, some before the first byte; `slow` connections read 512 bytes every 20 ms, and are not timed.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadtests.mock_worker import build

SOURCES = Path(__file__).parent / "loadgen_cpp"
_LATE_SECONDS = 60.0


@dataclass(frozen=True)
class Load:
    """How a request is asked."""

    connections: int = 1
    seconds: float = 1.0
    rate: float = 0.0  # requests a second; 0: closed loop
    aborts: float = 0.0
    slow: int = 0  # of the connections


class Seen(msgspec.Struct):
    """What the client saw.  Times in milliseconds; `seconds` and `cpu` (its own) in seconds."""

    requests: int
    answered: int
    aborted: int
    unanswered: int
    errors: int  # answers that were no 200, and broken connections
    error: str  # the first
    events: int
    bytes: int
    seconds: float
    cpu: float
    ttfb_p50: float
    ttfb_p99: float
    whole_p50: float
    gap_p50: float
    gap_p99: float


class Generator:
    """The compiled client, and a folder for its requests."""

    def __init__(self, programs: Path, folder: Path) -> None:
        """Compiles when its sources changed.  Raises OSError or CalledProcessError."""
        self._program = build(programs, SOURCES, "loadgen")
        self._folder = folder

    def ask(self, port: int, path: str, body: bytes, load: Load) -> Seen:
        """One run.  Raises CalledProcessError when the port does not take connections."""
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        request = self._folder / "request"
        request.write_bytes(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        options = {
            "--port": port, "--request": request, "--connections": load.connections, "--slow": load.slow,
            "--seconds": load.seconds, "--rate": load.rate, "--aborts": load.aborts,
        }  # fmt: skip
        argv = [str(self._program), *(str(part) for option in options.items() for part in option)]
        ran = subprocess.run(
            argv, check=True, capture_output=True, text=True, timeout=load.seconds + _LATE_SECONDS
        )
        return msgspec.convert(json.loads(ran.stdout), Seen)
