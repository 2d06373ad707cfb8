import json

import pytest

from gateway.errors import (
    BadRequest,
    Busy,
    NoWorker,
    Overloaded,
    TooSlow,
    UnknownModel,
    Unreachable,
    sse_error,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BadRequest("no", "model"), 400, None),
        (UnknownModel("m"), 404, "model_not_found"),
        (NoWorker("m"), 503, "no_worker"),
        (Overloaded(7), 503, "overloaded"),
        (Unreachable(), 502, "upstream_error"),
        (Busy(), 503, "no_worker"),
        (TooSlow(), 504, "upstream_timeout"),
    ],
)
def test_every_error_is_one_openai_object_and_names_no_worker(
    error: NoWorker, status: int, code: str
) -> None:
    said = json.loads(error.body())["error"]
    assert (error.status, said["code"]) == (status, code)
    assert said["message"] == str(error)
    assert "secret" not in said["message"]
    assert (b"retry-after" in dict(error.headers())) == (status == 503)


def test_an_error_in_a_stream_is_one_event() -> None:
    event = sse_error(NoWorker("m"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
