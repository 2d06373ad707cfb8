import pytest

from gateway.proxy import _forwarded, whole_events


@pytest.mark.parametrize(
    ("data", "whole", "rest"),
    [
        (b"", b"", b""),
        (b"data: 1\n\n", b"data: 1\n\n", b""),
        (b"data: 1\n\ndata: 2\n\n", b"data: 1\n\ndata: 2\n\n", b""),
        (b"data: 1\n\ndata", b"data: 1\n\n", b"data"),
        (b"data: 1\n", b"", b"data: 1\n"),
        (b"\n\nx", b"\n\n", b"x"),
        (b"data: 1\r\n\r\ndata", b"data: 1\r\n\r\n", b"data"),
        (b": ping\n\ndata: 1\r\n\r\ny", b": ping\n\ndata: 1\r\n\r\n", b"y"),
    ],
)
def test_a_stream_is_cut_after_its_last_whole_event(data: bytes, whole: bytes, rest: bytes) -> None:
    assert whole_events(data) == (whole, rest)


def test_an_endless_event_is_passed_on_in_pieces() -> None:
    endless = b"x" * ((1 << 20) + 1)
    assert whole_events(endless) == (endless, b"")


def test_hop_by_hop_headers_and_those_they_name_stay_here() -> None:
    sent = [
        (b"connection", b"close, X-A"),
        (b"x-a", b"1"),
        (b"host", b"h"),
        (b"x-b", b"2"),
        (b"upgrade", b"h2c"),
    ]
    assert _forwarded(sent) == [(b"x-b", b"2")]


def test_headers_whose_names_could_be_taken_for_others_stay_here() -> None:
    assert _forwarded([(b"content_length", b"5"), (b"x-b", b"a_b")]) == [(b"x-b", b"a_b")]
