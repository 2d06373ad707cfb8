"""What a worker says when it is asked over HTTP: whether it is well, and which adapters it has."""

import httpx
import msgspec

HEALTH_SECONDS = 1.0


class Probe:
    """REQUIRES: `http` is opened and closed by the caller.  Nothing here raises: no worker's address may keep
    the others from being asked."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def healthy(self, url: str, otherwise: bool) -> bool:
        """Whether /health answers 200; `otherwise` where it was not asked, for want of a connection."""
        try:
            reply = await self._http.get(f"{url}/health", timeout=HEALTH_SECONDS)
        except httpx.PoolTimeout:
            return otherwise
        except Exception:  # noqa: BLE001  whatever it was, it did not answer
            return False
        return reply.status_code == 200

    async def adapters(self, url: str) -> tuple[str, ...] | None:
        """vLLM's /v1/models names each LoRA adapter with the base model as its parent.  None: it did not
        say."""
        try:
            reply = await self._http.get(f"{url}/v1/models", timeout=HEALTH_SECONDS)
            cards = msgspec.json.decode(reply.content, type=_Cards).data
        except Exception:  # noqa: BLE001  as above
            return None
        return tuple(sorted({card.id for card in cards if card.parent}))


class _Card(msgspec.Struct):
    id: str
    parent: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]
