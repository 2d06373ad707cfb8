"""What the steps of a request say of themselves, to one that forgets it all.

The one that remembers is in gateway/spans.py.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from gateway.wire import Headers
from router.placement import Placement


class Attempt:
    """One request to one worker.  Exceptions pass through it."""

    connected: Callable[[], None] | None = None  # to be called when a connection is there, new or kept

    def headers(self, given: Headers) -> Headers:
        """The caller's, made ours: what the worker records belongs under this attempt."""
        return given

    def first_byte(self, status: int) -> None:
        """The worker answers, with this HTTP status."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """It is over, and `exc` says why, if it failed."""


class Trace:
    """One request.  Times are time.perf_counter()'s; no method raises or waits."""

    id = ""  # of the W3C trace it belongs to, 32 hex digits

    def step(self, name: str, started: float) -> float:
        """A step is over; returns when, because that is when the next one begins."""
        return time.perf_counter()

    def placed(self, started: float, decision: Mapping[str, Any]) -> None:
        """The router has decided; `decision` is the line of its log."""

    def attempt(self, placement: Placement, path: str, model: str, before: int) -> Attempt:
        """A worker is about to be asked, after `before` others."""
        return _NO_ATTEMPT


_NO_ATTEMPT = Attempt()
NO_TRACE = Trace()
