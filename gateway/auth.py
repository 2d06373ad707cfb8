"""Who is calling: the API key in a request's headers.

`Authorization: Bearer KEY` (RFC 6750) as OpenAI's clients send it, or `x-api-key: KEY` as Anthropic's do.
"""

from gateway.wire import Headers

_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})


def credential(headers: Headers) -> bytes:
    """What is shown as a key; b"" for nothing."""
    said = dict(headers)
    scheme, _, token = said.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else said.get(b"x-api-key", b"").strip()


def without_credentials(headers: Headers) -> Headers:
    """For a worker, which is not the caller's to authenticate to."""
    return [(name, value) for name, value in headers if name not in _CREDENTIALS]
