"""What every answer carries, whoever gives it: the request's id, and what browsers need of other origins.

Pure ASGI around the whole application, so that errors of the framework have it too.  Of a stream only the
first message is looked at.
"""

import random
import re
from collections.abc import Awaitable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = b"x-request-id"
_FIT = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")  # for a header, a log line and vLLM's own ids
_OPERATORS = ("/admin", "/dashboard")  # never for the pages of other origins


class Envelope:
    """An id that is missing or unfit is replaced, for the worker as well."""

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        """`origins` may call from a browser; "*" means all of them."""
        self._app = self._open = app
        if origins:
            self._open = CORSMiddleware(
                app,
                allow_origins=origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("*",),
            )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        given = [value for key, value in scope["headers"] if key == REQUEST_ID]
        fit = len(given) == 1 and _FIT.fullmatch(given[0])
        name = (REQUEST_ID, given[0] if fit else b"%032x" % random.getrandbits(128))
        scope["headers"] = [*(header for header in scope["headers"] if header[0] != REQUEST_ID), name]

        def answer(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), name]
            return send(message)

        inner = self._app if scope["path"].startswith(_OPERATORS) else self._open
        return inner(scope, receive, answer)
