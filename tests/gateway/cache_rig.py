"""A worker as `cairn` sees it, without vLLM: a real Store behind a real IndexWriter that hears wishes."""

import threading
from collections.abc import Sequence
from pathlib import Path

from cacheengine.index_schema import Entry, WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of, probe_keys
from cacheengine.plan import HOST, NO_PARENT, REDIS, Want
from cacheengine.store import Store
from cacheengine.tier import Ref
from cacheengine.tiers.redis import RedisTier
from cacheengine.wishes import Listener, Wish

NS = namespace_of({"model": "cli"})
SCHEME = KeyScheme(NS, 16)
MODEL = "smol/test@1"  # a name that must be escaped
PAYLOAD = 8192
SLOTS = 64  # of host memory


class CacheWorker:
    """`note` stands for the disk tier: what outlives the process."""

    def __init__(
        self, url: str, worker_id: str = "w1", *, note: Path | None = None, http: str = "http://127.0.0.1:1",
        model: str = MODEL, model_path: str = "/m", scheme: KeyScheme = SCHEME,
        lease: float = 1.5, probes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.url, self.lock, self.deaf = url, threading.Lock(), False
        self.store, self.pins, self.cleared = Store({HOST: SLOTS, REDIS: 1000}, 1), frozenset[ChunkKey](), 0
        info = WorkerInfo(
            worker_id, http, model, model_path, scheme.namespace.hex(), scheme.chunk_tokens,
            tuple(probes or probe_keys(scheme)), payload_bytes=PAYLOAD,
        )  # fmt: skip
        self.scheme, self.model = scheme, model
        self.listener = Listener(info.namespace, model, self.obey, note)
        self.writer = IndexWriter(url, info, 600, lease, dict, self.inventory, wishes=self.listener)
        self.listener.start(url)
        self.writer.start()

    def obey(self, wish: Wish, before: Wish) -> None:
        """As SchedulerHalf does."""
        if self.deaf:
            raise OSError("the disk said no")
        with self.lock:
            if wish.pins_version != before.pins_version:
                self.pins = wish.pins
                self.store.set_pins(wish.pins)
            if wish.clear_epoch != before.clear_epoch:
                self.cleared += 1
                self.store.erased(self.store.clear())
            changes = self.store.drain_changes()
        self.writer.publish([Entry(*change) for change in changes])

    def hold(self, keys: Sequence[ChunkKey]) -> None:
        """Save chunks of one prompt to the host tier, and say so."""
        wants = [Want(key, keys[i - 1] if i else NO_PARENT, keys[0], 1) for i, key in enumerate(keys)]
        with self.lock:
            plan = self.store.begin_save("r", wants, keys)
            assert plan is not None
            self.store.settle(plan.id, len(plan.moves))
            changes = self.store.drain_changes()
        self.writer.publish([Entry(*change) for change in changes])

    def share(self, keys: Sequence[ChunkKey], ttl_seconds: int = 1000) -> RedisTier:
        """Write blobs of these chunks as the shared tier does."""
        tier = RedisTier(
            self.url, self.model, self.scheme.namespace, PAYLOAD, self.scheme.chunk_tokens, "float32",
            "LBHNC", 0, 1, "w", ttl_seconds, 2000,
        )  # fmt: skip
        refs = [Ref(key, parent=keys[i - 1] if i else b"", root=keys[0]) for i, key in enumerate(keys)]
        payloads = [memoryview(key * (PAYLOAD // len(key))) for key in keys]
        assert tier.write(refs, payloads) == len(keys)
        tier.close()
        return tier

    def inventory(self) -> list[Entry]:
        return [Entry(*change) for change in self.store.inventory()]

    def close(self) -> None:
        self.writer.close()
