"""What a worker says when it is asked over HTTP: whether it is well, and which models it has."""

import httpx
import msgspec

HEALTH_SECONDS = 1.0


class Card(msgspec.Struct, frozen=True):
    """One model of a worker.  vLLM names each LoRA adapter with the base model as its parent."""

    id: str
    parent: str | None = None
    root: str | None = None
    max_model_len: int | None = None


class Probe:
    """REQUIRES: `http` is opened and closed by the caller.  Nothing here raises: no worker's address may keep
    the others from being asked."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def healthy(self, url: str, otherwise: bool) -> bool | None:
        """Whether /health answers 200; None: it is late; `otherwise`: not asked, for want of a connection."""
        try:
            reply = await self._http.get(f"{url}/health", timeout=HEALTH_SECONDS)
        except httpx.PoolTimeout:
            return otherwise
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            return None
        except Exception:  # noqa: BLE001  whatever it was, it did not answer
            return False
        return reply.status_code == 200

    async def cards(self, url: str) -> tuple[Card, ...] | None:
        """What its /v1/models says.  None: nothing."""
        try:
            reply = await self._http.get(f"{url}/v1/models", timeout=HEALTH_SECONDS)
            return tuple(msgspec.json.decode(reply.content, type=_Cards).data)
        except Exception:  # noqa: BLE001  as above
            return None


class _Cards(msgspec.Struct):
    data: list[Card]
