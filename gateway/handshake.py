"""Does a worker tokenize as we do?  Asked once per life of a worker, before its cache is counted on.

The registry compares chunk keys of a fixed vector; here the worker's /tokenize answers a probe chat and a
probe prompt.  A worker that differs is distrusted: it is routed by hash only, with a log line and a metric.
A mismatch can cost hits, never an answer.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import httpx
import msgspec

from gateway.ask import Ask
from gateway.metrics import Metrics
from gateway.template import Unkeyable
from gateway.tokenize import ModelTokenizer
from router.registry import Registry
from router.worker import Worker

log = logging.getLogger(__name__)

PROBE_CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a probe.\n"},
    {"role": "user", "content": "Grüße, 世界! 12345 🙂\n\n   def f(x): return  x**2  # I'LL don't"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "again?"},
]
PROBE_PROMPT = "Once upon a time, in 1984,\n\tes war einmal … 昔々"
_INTERVAL_SECONDS = 1.0
_TIMEOUT_SECONDS = 10.0


class Handshake:
    """Owns the tokenizers.  REQUIRES: used from one event loop; `http` outlives it."""

    def __init__(
        self,
        registry: Registry,
        http: httpx.AsyncClient,
        pool: Executor,
        metrics: Metrics,
        path: str,
    ) -> None:
        """`path` overrides the model path that workers announce."""
        self._registry, self._http, self._pool, self._metrics = registry, http, pool, metrics
        self._path = path
        self._tokenizers: dict[str, ModelTokenizer | None] = {}  # by folder; None: cannot be read
        self._loading = asyncio.Lock()  # two workers of one model: one load
        self._met: set[tuple[str, str, int]] = set()  # lives of workers that were asked

    def tokenizer(self, worker: Worker) -> ModelTokenizer | None:
        """The tokenizer of the worker's model, once loaded; None when there is none we can use."""
        return self._tokenizers.get(self._path or worker.model_path)

    async def run(self) -> None:
        """Meet every new worker, for ever."""
        while True:
            try:
                await self.meet(self._registry.snapshot())
            except Exception:  # the top of a task
                log.exception("handshake")
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def meet(self, workers: Sequence[Worker]) -> None:
        """Ask those of `workers` not yet asked in this life; who does not answer is asked again next time."""
        lives = {(worker.id, worker.boot_id, worker.epoch): worker for worker in workers}
        self._met &= lives.keys()
        new = [life for life in lives if life not in self._met]
        settled = await asyncio.gather(*(self._settled(lives[life]) for life in new))
        self._met |= {life for life, done in zip(new, settled, strict=True) if done}

    async def _settled(self, worker: Worker) -> bool:
        if worker.namespace is None:
            return True  # no cache of ours: nothing to agree on
        if not worker.trusted:
            self._metrics.mismatch.labels("keys").inc()
            return True  # the registry has said why
        tokenizer = await self._load(self._path or worker.model_path)
        if tokenizer is None:
            return True
        try:
            for body, chat in (({"messages": PROBE_CHAT}, True), ({"prompt": PROBE_PROMPT}, False)):
                theirs = await self._their_ids(worker, body)
                ours = _our_ids(tokenizer, body, chat)
                if theirs != ours:
                    return self._differs(worker, ours, theirs)
        except httpx.HTTPError as exc:
            log.debug("worker %s does not answer /tokenize: %s", worker.id, exc)
            return False
        log.info("worker %s tokenizes as we do (%s)", worker.id, tokenizer.encoder.name)
        return True

    def _differs(self, worker: Worker, ours: list[int] | None, theirs: list[int] | None) -> bool:
        pairs = zip(ours or [], theirs or [], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours or []), len(theirs or [])))
        log.warning(
            "worker %s tokenizes unlike us from token %d on; it is routed by hash only", worker.id, at
        )
        self._metrics.mismatch.labels("tokens").inc()
        self._registry.distrust(worker)
        return True

    async def _their_ids(self, worker: Worker, body: dict[str, Any]) -> list[int] | None:
        """None when the worker refuses (it has no chat template, say).  Raises httpx.HTTPError."""
        reply = await self._http.post(
            worker.url + "/tokenize", json={"model": worker.model, **body}, timeout=_TIMEOUT_SECONDS
        )
        if reply.status_code == 400:
            return None
        reply.raise_for_status()
        try:
            return msgspec.json.decode(reply.content, type=_Tokenized).tokens
        except msgspec.DecodeError as exc:
            raise httpx.DecodingError(str(exc)) from exc

    async def _load(self, folder: str) -> ModelTokenizer | None:
        async with self._loading:
            if folder not in self._tokenizers:
                loop = asyncio.get_running_loop()
                self._tokenizers[folder] = await loop.run_in_executor(self._pool, self._read, folder)
        return self._tokenizers[folder]

    def _read(self, folder: str) -> ModelTokenizer | None:
        try:
            tokenizer = ModelTokenizer.load(Path(folder))
        except (OSError, ValueError) as exc:
            log.warning("no tokenizer in %r, its requests are routed without keys: %s", folder, exc)
            self._metrics.mismatch.labels("no_tokenizer").inc()
            return None
        if tokenizer.note:
            log.info("%s is tokenized with `tokenizers`: %s", folder, tokenizer.note)
        return tokenizer


class _Tokenized(msgspec.Struct):
    tokens: list[int]


def _our_ids(tokenizer: ModelTokenizer, body: dict[str, Any], chat: bool) -> list[int] | None:
    try:
        return tokenizer.tokens(Ask(**body), chat).ids
    except Unkeyable:
        return None
