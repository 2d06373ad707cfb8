import pytest

from gateway.usage import NO_USAGE, TAIL_BYTES, Usage, read_usage


@pytest.mark.parametrize(
    ("tail", "usage"),
    [
        (b'{"usage":{"prompt_tokens":9,"total_tokens":12,"completion_tokens":3}}', Usage(9, 3, None)),
        (
            b'{"usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": '
            b'{"audio_tokens": null, "cached_tokens": 4}, "completion_tokens_details": null}}',
            Usage(9, 3, 4),
        ),
        (
            b'{"usage":{"prompt_tokens":9,"total_tokens":9,"prompt_tokens_details":null}}',
            Usage(9, None, None),
        ),
        (
            b'"usage":{"input_tokens":20,"input_tokens_details":{"cached_tokens":16,"cached_tokens_per_turn":'
            b'[1]},"output_tokens":5,"output_tokens_details":{"reasoning_tokens":2}},"user":null}',
            Usage(20, 5, 16),
        ),
    ],
    ids=["completions", "chat", "embeddings", "responses"],
)
def test_every_spelling_of_usage_is_read(tail: bytes, usage: Usage) -> None:
    assert read_usage(tail) == usage


def test_anthropics_prompt_includes_what_the_cache_held() -> None:
    said = (
        b'"usage":{"input_tokens":4,"output_tokens":7,'
        b'"cache_creation_input_tokens":1,"cache_read_input_tokens":16}'
    )
    assert read_usage(said) == Usage(21, 7, 16)


def test_the_last_usage_of_a_stream_counts() -> None:
    events = b'{"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n' * 3
    assert read_usage(events + b'{"usage":{"prompt_tokens":9,"completion_tokens":4}}').completion == 4
    assert read_usage(events + b'data: {"usage":null}\n\ndata: [DONE]').completion == 1


def test_generated_text_cannot_pose_as_usage() -> None:
    said = rb'{"content": "\"usage\": {\"prompt_tokens_details\": {\"cached_tokens\": 9}}"}'
    assert read_usage(said) == NO_USAGE
    assert read_usage(said + b'"usage":{"prompt_tokens_details":{"audio":1,"cached_tokens":4}}').cached == 4


@pytest.mark.parametrize(
    "tail",
    [b"", b'"usage":', b'"usage":{', b'"usage":{"prompt_tokens":-1}', b'"usage":{"prompt_tokens":1e999}x'],
)
def test_an_answer_that_does_not_say_is_no_usage(tail: bytes) -> None:
    assert read_usage(tail) == NO_USAGE


def test_a_number_without_an_end_is_not_a_count() -> None:
    number = b"9" * TAIL_BYTES
    assert read_usage(b'"usage":{"prompt_tokens":' + number).prompt is None
