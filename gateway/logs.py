"""Lines of the process's log: text or JSON, one for each request, written by a thread of their own.

A line is one line: what is not printable is escaped, in text as Python escapes it, in JSON as RFC 8259 does,
and a traceback's further lines are indented in text, so nothing a client sends can look like a line of ours.
Whoever reads the log may be slow or stuck: `MAX_WAITING` lines wait for it, the rest are dropped and counted.
"""

import contextlib
import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, Any

from gateway.config import GatewayConfig
from gateway.exchange import Exchange

MAX_WAITING = 10_000  # lines
MAX_VALUE = 512  # characters of one value of a request's line
_LAST_WORDS_SECONDS = 2.0
_CHATTY = ("httpx", "httpcore", "urllib3")  # a line for every health check, and headers at `debug`
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)

log = logging.getLogger(__name__)


def request_line(exchange: Exchange) -> None:
    """What is known of a request that is over; never its words, its headers or its key."""
    if log.isEnabledFor(logging.INFO):
        log.info("request", extra={"fields": _fields(exchange)})


def _fields(exchange: Exchange) -> dict[str, Any]:
    prompt, placement, usage = exchange.prompt, exchange.placement, exchange.usage
    return {
        "request_id": exchange.request_id[:MAX_VALUE] or None,
        "trace_id": exchange.trace.id or None,
        "model": exchange.model,
        "path": exchange.path[:MAX_VALUE],
        "status": exchange.status,
        "error": exchange.failure or None,
        "worker": placement.worker.id if placement else None,
        "reason": placement.reason if placement else None,
        "stream": exchange.client.streams,
        "prompt_tokens": usage.prompt if usage.prompt is not None else prompt.tokens if prompt else None,
        "expected_cached_tokens": placement.expected_hit_tokens if placement else None,
        "cached_tokens": usage.cached,
        "completion_tokens": usage.completion,
        "ttft_ms": None if exchange.ttft is None else _ms(exchange.ttft),
        "total_ms": _ms(exchange.total),
        "queue_ms": _ms(exchange.queued),
        "retries": max(0, exchange.attempts - 1),
        "tenant": exchange.caller.name[:MAX_VALUE] or None,
        "client_abort": exchange.aborted,
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


class JsonLines(logging.Formatter):
    """`ts` (RFC 3339, UTC), `level`, `logger`, `message`, then a request's fields, all of them every time."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # plain ASCII: every control character is escaped


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO name: message`, then what is known of a request as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        said = [_escaped(record.getMessage())]
        for name, value in getattr(record, "fields", {}).items():
            if value is not None:
                said.append(f"{name}={_quoted(value)}")
        if record.exc_info:
            raised = self.formatException(record.exc_info).split("\n")
            said[-1] += "".join(f"\n    {_escaped(line)}" for line in raised)
        return f"{_when(record)} {record.levelname} {_escaped(record.name)}: {' '.join(said)}"


def _when(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _escaped(text: str) -> str:
    if text.isprintable():  # no control character, separator, direction mark or lone surrogate
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class Writer(logging.Handler):
    """Takes lines and returns at once; a thread formats and writes them.  close() writes what waits, for a
    little while."""

    def __init__(self, out: IO[str], max_waiting: int = MAX_WAITING) -> None:
        super().__init__()
        self._out = out
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(max_waiting)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="cairn-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:  # now: what it speaks of may change
            record.msg, record.args = record.getMessage(), None
        except Exception:  # noqa: BLE001  a line with a mistake in it must not fail who says it
            record.msg, record.args = f"{record.msg!r} with {record.args!r}", None
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1  # handle() holds the lock

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_LAST_WORDS_SECONDS)
        self._thread.join(_LAST_WORDS_SECONDS)
        super().close()

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._write(record)
            if self._dropped and self._waiting.empty():
                with self.lock or contextlib.nullcontext():
                    lost, self._dropped = self._dropped, 0
                message = f"{lost} lines were dropped: whoever reads this log was too slow"
                self._write(logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None))

    def _write(self, record: logging.LogRecord) -> None:
        # a closed pipe, a value that cannot be formatted: there is nobody left to tell
        with contextlib.suppress(Exception):
            self._out.write(self.format(record) + "\n")
            self._out.flush()


@contextlib.contextmanager
def opened(config: GatewayConfig, out: IO[str] | None = None) -> Iterator[None]:
    """All that the process logs, uvicorn's lines too, goes to `out` (stderr) as `config` says."""
    writer = Writer(out or sys.stderr)
    writer.setFormatter(JsonLines() if config.log_format == "json" else TextLines())
    root, level = logging.getLogger(), config.log_level.upper()
    root.addHandler(writer)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(writer)
        writer.close()
