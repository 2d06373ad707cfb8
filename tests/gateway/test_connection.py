"""What a caller's connection does with writes; tests/gateway/test_hostile_sockets.py has its bounds."""

import asyncio

from gateway.connection import Corked


class Recorder:
    """A transport that remembers."""

    def __init__(self) -> None:
        self.said: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.said.append(data)

    def close(self) -> None:
        self.said.append("close")

    def abort(self) -> None:
        self.said.append("abort")

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> str:
        return f"its {name}"


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def said(*writes: bytes, turns: int = 0, close: bool = False) -> list[bytes | str]:
    """What leaves after these writes in one turn of the loop, and so many turns more."""

    async def body() -> list[bytes | str]:
        recorder = Recorder()
        corked = Corked(recorder, asyncio.get_running_loop())
        corked.cork()
        for data in writes:
            corked.write(data)
        if close:
            corked.close()
        for _ in range(turns):
            await asyncio.sleep(0)
        return [*recorder.said]

    return asyncio.run(body())


def test_a_head_leaves_with_the_first_of_its_body():
    assert said(HEAD, b"one", b"two", turns=2) == [HEAD + b"one", b"two"]


def test_a_head_without_a_body_leaves_when_the_turn_is_over():
    assert said(HEAD) == []
    assert said(HEAD, turns=2) == [HEAD]


def test_an_answer_in_between_is_not_held_back():
    assert said(b"HTTP/1.1 100 Continue\r\n\r\n") == [b"HTTP/1.1 100 Continue\r\n\r\n"]


def test_what_is_written_to_an_earlier_question_is_not_held_back():
    assert said(b"rest of a stream", HEAD, b"body", b"more", turns=2) == [
        b"rest of a stream", HEAD + b"body", b"more",
    ]  # fmt: skip


def test_nothing_is_held_back_where_no_head_is_expected():
    recorder = Recorder()
    Corked(recorder, None).write(HEAD)
    assert recorder.said == [HEAD]


def test_what_is_held_back_leaves_before_the_connection_closes():
    assert said(HEAD, close=True, turns=2) == [HEAD, "close"]


def test_the_rest_is_the_transports_own():
    corked = Corked(Recorder(), None)
    assert corked.get_extra_info("peername") == "its peername"
    assert corked.is_closing() is False
