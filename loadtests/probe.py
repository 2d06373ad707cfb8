"""How long a loaded server takes to answer what costs it nothing."""

import http.client
import statistics
import threading
import time
from types import TracebackType
from typing import Self

_PAUSE_SECONDS = 0.02


class Probe:
    """GET /health every 20 ms while the `with` lasts; `p99` in milliseconds, 0 when nothing was asked."""

    def __init__(self, port: int, asking: bool = True) -> None:
        self.p99 = 0.0
        self._port, self._asking = port, asking
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe")

    def __enter__(self) -> Self:
        if self._asking:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._asking:
            self._thread.join()

    def _run(self) -> None:
        found: list[float] = []
        line = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        while not self._over.wait(_PAUSE_SECONDS):
            began = time.perf_counter()
            try:
                line.request("GET", "/health")
                line.getresponse().read()
            except (OSError, http.client.HTTPException):
                line.close()
            found.append(1e3 * (time.perf_counter() - began))
        line.close()
        if len(found) > 1:
            self.p99 = statistics.quantiles(found, n=100, method="inclusive")[98]
