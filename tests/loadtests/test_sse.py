import json

import pytest

from loadtests.sse import Answer, StreamFailed


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def word(text: str, **more: object) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, **more}])


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
USAGE = event(
    choices=[],
    usage={"prompt_tokens": 700, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 512}},
)
DONE = b"data: [DONE]\n\n"


def heard(*pieces: tuple[float, bytes]) -> Answer:
    answer = Answer(10.0)
    for now, piece in pieces:
        answer.feed(piece, now)
    answer.finish()
    return answer


def test_the_role_is_not_a_token():
    answer = heard(
        (10.1, ROLE), (10.5, word("a")), (10.6, word("b")), (10.9, word("c")), (11.0, USAGE + DONE)
    )
    assert answer.ttft == pytest.approx(0.5)
    assert answer.gaps == pytest.approx([0.1, 0.3])
    assert answer.seconds == pytest.approx(1.0)
    assert answer.text == "abc"


def test_usage_is_what_the_server_says():
    answer = heard((11.0, word("a") + USAGE + DONE))
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (700, 512, 3)


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
def test_a_server_need_not_report_cached_tokens(details):
    usage = {"prompt_tokens": 7, "completion_tokens": 2, **details}
    answer = heard((11.0, word("a") + event(choices=[], usage=usage) + DONE))
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (7, 0, 2)


def test_without_usage_the_events_are_counted():
    assert heard((11.0, word("a") + word("b") + DONE)).completion_tokens == 2


def test_bytes_may_be_cut_anywhere():
    stream = ROLE + b": keep-alive\r\n\r\n" + word("Grüße ") + word("🙂", finish_reason="stop") + USAGE + DONE
    whole = heard((11.0, stream))
    for cut in range(1, len(stream)):
        answer = heard((11.0, stream[:cut]), (11.0, stream[cut:]))
        assert answer == whole


def test_a_completion_has_text_and_even_an_empty_one_is_a_token():
    pieces = event(choices=[{"index": 0, "text": ""}]) + event(choices=[{"index": 0, "text": "x"}])
    answer = heard((10.2, pieces), (10.4, DONE))
    assert len(answer.arrivals) == 2
    assert answer.text == "x"


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (event(error={"message": "the worker died", "type": "server_error"}), "the worker died"),
        (word("a"), r"after 1 tokens without \[DONE\]"),
        (DONE, "no token came"),
        (b"data: {half\n\n", "not JSON"),
    ],
    ids=["error", "cut off", "empty", "garbled"],
)
def test_an_answer_that_is_none_fails(stream, why):
    with pytest.raises(StreamFailed, match=why):
        heard((10.1, stream))
