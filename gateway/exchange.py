"""What is known of one request under way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cacheengine.keys import ChunkKey
from gateway.endpoints import Endpoint
from gateway.keyring import ANONYMOUS, Key
from gateway.limits import Visit
from gateway.proxy import Client
from gateway.trace import NO_TRACE, Trace
from gateway.upload import Upload
from gateway.usage import NO_USAGE, Usage
from router.placement import Placement
from router.policy import SLOWEST

CLIENT_CLOSED = 499  # the status of a request whose client left before the first byte


class Prompt(NamedTuple):
    """What routing needs to know of a request."""

    model: str
    keys: Sequence[ChunkKey]
    tokens: int
    affinity: bytes
    unkeyed: str = ""  # why there are no keys
    session: bytes = b""  # the caller's own name for the conversation
    alone: bool = True  # the body has this one prompt: what the worker says of its cache is about it


@dataclass(slots=True)
class Exchange:
    """One request under way, and what is known of it so far."""

    client: Client
    endpoint: Endpoint
    path: str  # for the worker; the endpoint's own, unless that stands for many
    arrived: float
    body: bytes = b""
    upload: Upload | None = None  # instead of a body: one that is streamed
    model: str = "unknown"  # a metric's label: only ever the name of a model that is served
    request_id: str = ""
    caller: Key = ANONYMOUS  # the record of its key; in its name it waits for room
    visit: Visit | None = None  # what is held for it under its limits; None where keys are not asked for
    prompt: Prompt | None = None
    placement: Placement | None = None  # of the last attempt
    attempts: int = 0  # workers that were asked
    answered: int = 0  # the worker's status; the client was told 200 where comments went before it
    queued: float = 0.0  # seconds it waited for its turn
    ttft: float | None = None  # seconds from `arrived` to the worker's first byte
    usage: Usage = NO_USAGE  # what the worker says it cost; also of an answer that broke off
    failure: str = ""  # the code of the error it ended with
    aborted: bool = False  # the client hung up before the end
    trace: Trace = NO_TRACE
    total: float = 0.0  # seconds from `arrived` to the end, once it has come

    @property
    def status(self) -> int:
        """What the client was told."""
        return self.client.status or CLIENT_CLOSED

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed: as the worker counted, else as expected."""
        if self.usage.cached is not None:
            return self.usage.cached
        return self.placement.expected_hit_tokens if self.placement else 0

    @property
    def saved_seconds(self) -> float:
        """Computing that the cache spared this answer, less the time to load, at the worker's measured rates;
        0 where the worker has not measured them."""
        if self.placement is None or self.ttft is None or self.client.status != 200:
            return 0.0
        rate = self.placement.worker.load.prefill_rate
        loading = self.placement.terms_ms.get("transfer", 0.0) / 1000
        return max(0.0, self.cached_tokens / rate - loading) if rate >= SLOWEST else 0.0
