"""What an answer says it cost, from its last bytes: OpenAI's, the Responses API's and Anthropic's spellings.

Nothing is parsed but the last `"usage": {…}`: inside a JSON string the quotes would be escaped, so generated
text cannot pose as one.  Fields: OpenAI's API reference (CompletionUsage, ResponseUsage) and Anthropic's
(Usage), whose `input_tokens` leaves out what came from the cache.
"""

import re
from typing import NamedTuple

TAIL_BYTES = 4096  # `usage` is in the last event, or near the end of a JSON answer

USAGE = re.compile(rb'"usage":\s*\{')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,15})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,15})\b')
_CACHED = re.compile(rb'"(?:prompt|input)_tokens_details":\s*\{[^{}]*"cached_tokens":\s*(\d{1,15})\b')
_READ = re.compile(rb'"cache_read_input_tokens":\s*(\d{1,15})\b')
_WRITTEN = re.compile(rb'"cache_creation_input_tokens":\s*(\d{1,15})\b')


class Usage(NamedTuple):
    """Tokens of one answer; None where it does not say."""

    prompt: int | None = None  # all of them, cached or not
    completion: int | None = None
    cached: int | None = None  # of the prompt


NO_USAGE = Usage()


def read_usage(tail: bytes) -> Usage:
    """The last usage object in `tail`; NO_USAGE where there is none, or it began before the tail."""
    at = tail.rfind(b'"usage":')
    while at >= 0 and not USAGE.match(tail, at):
        at = tail.rfind(b'"usage":', 0, at)
    if at < 0:
        return NO_USAGE
    said = tail[at:]
    prompt, cached = _number(_PROMPT, said), _number(_CACHED, said)
    if b'"cache_' in said:  # Anthropic's
        read = _number(_READ, said)
        if prompt is not None:
            prompt += (read or 0) + (_number(_WRITTEN, said) or 0)
        cached = cached if read is None else read
    return Usage(prompt, _number(_COMPLETION, said), cached)


def _number(pattern: re.Pattern[bytes], said: bytes) -> int | None:
    found = pattern.search(said)
    return int(found[1]) if found else None
