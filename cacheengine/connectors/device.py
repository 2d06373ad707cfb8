"""Which chunks lie in vLLM's own prefix cache now: the device tier of the index.

vLLM hands the connector its block pool for "per-GPU block status tracking" (KVConnectorBase_V1,
bind_gpu_block_pool) and calls back before it gives a released block to somebody else or resets its cache
(BlockPool.unpin_blocks).  So nothing is polled: a claim costs a microsecond, its end arrives by itself.

One watch a chunk, on its last block, is enough: vLLM frees a request's blocks from the end and evicts in
that order, so while a chunk's last block is cached, so is everything before it.  Claims are prefix-closed by
themselves.  Whoever calls merge() or changes claims holds the caller's lock; vLLM's call back needs none.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheengine.connectors.planner import Scheduled
from cacheengine.index_schema import DEVICE, Entry
from cacheengine.keys import ChunkKey

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(slots=True)
class _Claim:
    root: ChunkKey
    block: int  # the chunk's last block, the one watched
    above: "_Claim | None"  # of the chunk before it
    children: set[ChunkKey] | None = None


class DeviceMap:
    """REQUIRES a pool with prefix caching on, and one KV cache group."""

    def __init__(self, pool: "BlockPool", chunk_tokens: int, blocks_per_chunk: int) -> None:
        self._pool, self._n, self._per = pool, chunk_tokens, blocks_per_chunk
        self._claims: dict[ChunkKey, _Claim] = {}
        self._watched: dict[int, ChunkKey] = {}  # block → the chunk that ends in it
        self._seen: dict[str, int] = {}  # leading chunks of a request already claimed
        self._reused: deque[tuple[int, ChunkKey]] = deque()  # filled while others may be reading
        self._changed: dict[ChunkKey, ChunkKey] = {}  # key → root

    @property
    def slots(self) -> int:
        """Chunks vLLM's cache could hold."""
        return (self._pool.num_gpu_blocks - 1) // self._per

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def stirred(self) -> bool:
        """Something left, and nobody was told yet."""
        return bool(self._reused or self._changed)

    def step(self, scheduled: Iterable[Scheduled], keys_of: Callable[[str], Sequence[ChunkKey]]) -> None:
        """Note the chunks this step completes or finds cached."""
        n, seen = self._n, self._seen
        for item in scheduled:
            chunks = (item.computed + item.new) // n
            if chunks != seen.get(item.req_id, 0):  # not in most decode steps
                keys = keys_of(item.req_id)
                self._claim(item.req_id, keys, min(chunks, len(keys)), item.blocks)

    def end(self, req_id: str) -> None:
        """The request is over; what it left in the cache stays claimed."""
        self._seen.pop(req_id, None)

    def clear(self) -> None:
        """Withdraw everything: chunks get other names from now on."""
        self._changed |= {key: claim.root for key, claim in self._claims.items()}
        self._claims.clear()
        self._watched.clear()
        self._seen.clear()
        self._reused.clear()

    def merge(self, changes: Iterable[Entry], store_bits: Callable[[ChunkKey], int]) -> list[Entry]:
        """The store's changes and ours since the last call, as one list: removals first, parents first."""
        self._settle()
        ours, self._changed = self._changed, {}
        gone: list[Entry] = []
        held: list[Entry] = []
        claims = self._claims
        for root, key, bits in changes:
            ours.pop(key, None)
            bits |= DEVICE if key in claims else 0
            (held if bits else gone).append(Entry(root, key, bits))
        for key, root in ours.items():
            bits = store_bits(key) | (DEVICE if key in claims else 0)
            (held if bits else gone).append(Entry(root, key, bits))
        return gone + held

    def inventory(self, changes: Iterable[Entry]) -> list[Entry]:
        """The store's inventory and ours.  Safe to call from another thread: it copies before it reads."""
        claims = dict(list(self._claims.items()))
        entries = [Entry(c.root, c.key, c.bits | (DEVICE if claims.pop(c.key, None) else 0)) for c in changes]
        return entries + [Entry(claim.root, key, DEVICE) for key, claim in claims.items()]

    # -- inside ------------------------------------------------------------------------------------

    def _claim(self, req_id: str, keys: Sequence[ChunkKey], chunks: int, blocks: Sequence[int]) -> None:
        """The first `chunks` chunks of a running request are in its `blocks`; note those vLLM has cached."""
        self._settle()
        claims, per = self._claims, self._per
        start = self._seen.get(req_id, 0)
        # after a preemption it begins again; and what stood before may have left meanwhile
        if start > chunks or (start and keys[start - 1] not in claims):
            start = 0
        above = claims[keys[start - 1]] if start else None
        fresh: list[KVCacheBlock] = []
        for i in range(start, chunks):
            key = keys[i]
            claim = claims.get(key)
            if claim is None:
                block = self._pool.blocks[blocks[(i + 1) * per - 1]]
                if block.block_hash is None or block.is_null:
                    chunks = i
                    break
                claim = self._note(key, keys[0], above, block.block_id)
                fresh.append(block)
            above = claim
        if fresh:
            # the request holds these blocks: reference counts and places in the queue stay as they were
            self._pool.touch(fresh)
            self._pool.unpin_blocks(fresh, self._on_reuse)
        self._seen[req_id] = chunks

    def _note(self, key: ChunkKey, root: ChunkKey, above: "_Claim | None", block_id: int) -> "_Claim":
        if block_id in self._watched:  # one block, one chunk; of a map that was cleared, say
            self._lose(block_id, self._watched[block_id])
        self._claims[key] = claim = _Claim(root, block_id, above)
        self._watched[block_id] = key
        self._changed[key] = root
        if above is not None:
            if above.children is None:
                above.children = set()
            above.children.add(key)
        return claim

    def _on_reuse(self, block: "KVCacheBlock") -> None:
        """vLLM is about to overwrite this block, or forgot its whole cache."""
        key = self._watched.pop(block.block_id, None)
        if key is not None:
            self._reused.append((block.block_id, key))

    def _settle(self) -> None:
        """Withdraw what was evicted, and what stood behind it."""
        while self._reused:
            self._lose(*self._reused.popleft())

    def _lose(self, block_id: int, key: ChunkKey) -> None:
        """The chunk is not in this block any more, and we know of no other."""
        claim = self._claims.get(key)
        if claim is None or claim.block != block_id:
            return
        if (above := claim.above) is not None and above.children is not None:
            above.children.discard(key)
        leaving = [key]
        while leaving:  # and all that stands behind it
            key = leaving.pop()
            claim = self._claims.pop(key)
            self._changed[key] = claim.root
            if claim.children:
                leaving += claim.children
