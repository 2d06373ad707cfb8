"""Everything the gateway says no with, in the shape OpenAI clients expect.

GatewayError
  BadRequest      400  the body is not what this endpoint takes
  Unauthorized    401  no API key that is known and has not expired
  UnknownModel    404  no worker serves that model
  RequestTooSlow  408  it took too long to arrive
  BodyTooLarge    413  more bytes than max_body_bytes
  TooMany         429  a limit of the caller's key; Retry-After says when there is room again
  HeadTooLarge    431  more bytes of headers than a connection takes
  KeysUnknown     503  keys are asked for and could not be read since the start
  NoWorker        503  nobody can take it now; Retry-After says when to come back
    Overloaded    503  max_inflight requests are already here
    QueueFull     503  max_queue requests already wait for room
    QueueTimeout  503  it waited longer than queue_timeout_seconds
    Crowded       503  more connections than the process keeps
  Upstream        502  a worker was tried and failed before its first byte reached the client
    Unreachable   502  it could not be connected to: the request never got there
    Busy          503  it answered 503 itself
    TooSlow       504  it was silent longer than the phase allows; never retried
  TookTooLong     504  the whole of it lasted longer than total_timeout_seconds

Worker answers with their own status (4xx, 5xx) are not errors here: they are relayed as they are.
A Dialect is the shape a refusal takes: OpenAI's, or Anthropic's on its own paths.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec


class GatewayError(Exception):
    """Root of every refusal.  `str(error)` is written for the person who reads it in a client."""

    status = 500
    kind = "server_error"
    code: str | None = "internal_error"
    param: str | None = None
    retry_after: int | None = None  # seconds

    def body(self) -> bytes:
        """The JSON document OpenAI's clients parse."""
        return error_body(str(self), self.kind, self.code, self.param)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Raw ASGI headers of a JSON answer made of this error."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        return headers


class BadRequest(GatewayError):
    status, kind, code = 400, "invalid_request_error", None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(GatewayError):
    status, kind, code, param = 404, "invalid_request_error", "model_not_found", "model"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist or is not served here.")


class BodyTooLarge(GatewayError):
    status, kind, code = 413, "invalid_request_error", "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than {limit} bytes.")


class RequestTooSlow(GatewayError):
    status, kind, code = 408, "invalid_request_error", "slow_request"

    def __init__(self) -> None:
        super().__init__("The request took too long to arrive.")


class HeadTooLarge(GatewayError):
    status, kind, code = 431, "invalid_request_error", "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request's target and headers are larger than {limit} bytes.")


class Unauthorized(GatewayError):
    """The same sentence for a wrong, an expired and a revoked key.  Never quotes what was sent."""

    status, kind, code = 401, "invalid_request_error", "invalid_api_key"

    def __init__(self, said: bool) -> None:
        super().__init__(
            "Incorrect API key provided."
            if said
            else "You didn't provide an API key: send it as `Authorization: Bearer KEY`."
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class TooMany(GatewayError):
    """`kind` as OpenAI has it: requests, tokens, insufficient_quota."""

    status = 429

    def __init__(self, message: str, kind: str, short: str, wait_ms: int | None, again: bool = True) -> None:
        """`short`: month, concurrency, requests or tokens, for metrics.  `wait_ms` None: waiting does not
        help.  `again` False: a client should not retry by itself."""
        super().__init__(message)
        self.kind, self.short, self._again = kind, short, again
        self.code = kind if kind == "insufficient_quota" else "rate_limit_exceeded"
        self.retry_after = None if wait_ms is None else max(1, -(-wait_ms // 1000))

    def headers(self) -> list[tuple[bytes, bytes]]:
        final = [] if self._again else [(b"x-should-retry", b"false")]
        return [*super().headers(), *final]


class KeysUnknown(GatewayError):
    status, code, retry_after = 503, "keys_unavailable", 1

    def __init__(self) -> None:
        super().__init__("API keys cannot be checked at the moment.")


class NoWorker(GatewayError):
    status, kind, code, retry_after = 503, "server_error", "no_worker", 1

    def __init__(self, model: str) -> None:
        super().__init__(f"No worker can serve the model `{model}` at the moment.")


class Overloaded(NoWorker):
    code = "overloaded"

    def __init__(self, inflight: int) -> None:
        GatewayError.__init__(self, f"{inflight} requests are already in flight; try again shortly.")


class QueueFull(NoWorker):
    code = "overloaded"

    def __init__(self, retry_after: int) -> None:
        GatewayError.__init__(self, "Too many requests are waiting already; try again later.")
        self.retry_after = retry_after


class QueueTimeout(NoWorker):
    code = "queue_timeout"

    def __init__(self, seconds: float, retry_after: int) -> None:
        GatewayError.__init__(self, f"No worker had room within {seconds:g} seconds; try again later.")
        self.retry_after = retry_after


class TookTooLong(GatewayError):
    status, code = 504, "request_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The answer was not complete within {seconds:g} seconds.")


class Crowded(NoWorker):
    code = "overloaded"

    def __init__(self, most: int) -> None:
        GatewayError.__init__(self, f"{most} connections are open already; try again shortly.")


class Upstream(GatewayError):
    """One worker failed one attempt.  The message names what happened, never the worker's address."""

    status, kind, code = 502, "server_error", "upstream_error"
    sentence = "The worker closed the connection before its answer was complete."

    def __init__(self, cause: object = "") -> None:
        super().__init__(self.sentence)
        self.cause = cause


class Unreachable(Upstream):
    sentence = "The worker could not be reached."


class Busy(Upstream):
    status, code, retry_after = 503, "no_worker", 1
    sentence = "Every worker that could serve this request is busy."


class TooSlow(Upstream):
    status, code = 504, "upstream_timeout"
    sentence = "The worker did not answer in time."


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def sse_error(error: GatewayError) -> bytes:
    """The same object as one server-sent event, for a stream that has already begun."""
    return b"data: " + error.body() + b"\n\n"


class Dialect(NamedTuple):
    """How one family of clients wants to be refused."""

    body: Callable[[GatewayError], bytes]  # the JSON document
    event: Callable[[GatewayError], bytes]  # the same inside a stream that has already begun


def _anthropic(error: GatewayError) -> bytes:
    """Types: Anthropic's API reference, "Errors"."""
    kind = _ANTHROPIC_KINDS.get(error.status)
    kind = kind or ("invalid_request_error" if error.status < 500 else "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": str(error)}})


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

OPENAI = Dialect(GatewayError.body, sse_error)
ANTHROPIC = Dialect(_anthropic, lambda error: b"event: error\ndata: " + _anthropic(error) + b"\n\n")
