"""When the words of a streamed answer came: its SSE bytes in, times and usage out.  No I/O here."""

import json
from dataclasses import dataclass, field
from typing import Any


class StreamFailed(Exception):
    """The stream said `error`, was not SSE, or ended too early."""


@dataclass
class Answer:
    """feed() the bytes as they arrive, then finish().  Times are seconds of the caller's clock."""

    began: float
    arrivals: list[float] = field(default_factory=list)  # of every event that carried a token
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # as the server counts; without usage, the events that carried one
    ended: float | None = None  # when [DONE] came
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Raises StreamFailed for an error event or an event that is not JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def finish(self) -> None:
        """The connection is at its end.  Raises StreamFailed when the answer is not."""
        if self.ended is None:
            raise StreamFailed(f"the stream ended after {len(self.arrivals)} tokens without [DONE]")
        if not self.arrivals:
            raise StreamFailed("no token came")
        self.completion_tokens = self.completion_tokens or len(self.arrivals)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def seconds(self) -> float:
        """Asked to [DONE]."""
        return (self.ended or self.began) - self.began

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.ended = now
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamFailed(f"not JSON: {data[:80]!r}") from None
        if "error" in event:
            raise StreamFailed(str(event["error"].get("message", event["error"]))[:200])
        for choice in event.get("choices") or ():
            self._choice(choice, now)
        if usage := event.get("usage"):
            self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.completion_tokens = int(usage.get("completion_tokens") or 0)
            self.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        """Completions send `text`, chats `delta`; a chat's opening delta has a role and no token."""
        delta = choice.get("delta") or {}
        said = choice.get("text") if "text" in choice else delta.get("content")
        if "text" in choice or said or choice.get("finish_reason"):
            self.arrivals.append(now)
            self.text += said or ""
