"""A tier that stores chunks in fewer bytes: the mover sees whole slots, the tier inside sees encoded ones."""

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cacheengine.arena import Arena
from cacheengine.codecs import Codec
from cacheengine.errors import TierDown
from cacheengine.tier import Ref, Tier

_BATCH = 4  # chunks encoded, then moved: what the mover reads at once


class Encoded:
    """`tier` keeps what `codec` makes of each chunk.  It is built for the encoded length of a whole chunk;
    its frames name the codec and check the encoded bytes, so nothing that was damaged is ever decoded.

    Encoded bytes wait in scratch of this wrapper's own: `threads` batches of four chunks, taken from the
    kernel at first use; a call beyond that waits for its turn.  Thread-safe if the tier inside is.
    """

    def __init__(self, tier: Tier, codec: Codec, payload_bytes: int, threads: int) -> None:
        self.inner = tier
        self.name = tier.name
        self.codec = codec
        self._scratch = Arena(threads * _BATCH, codec.encoded_bytes(payload_bytes))
        self._free: queue.LifoQueue[range] = queue.LifoQueue()  # the last one used is the warm one
        for at in range(0, threads * _BATCH, _BATCH):
            self._free.put(range(at, at + _BATCH))

    def prefix(self, refs: Sequence[Ref]) -> int:
        return self.inner.prefix(refs)

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        def move(refs: Sequence[Ref], whole: Sequence[memoryview], small: Sequence[memoryview]) -> int:
            filled = self.inner.read(refs, small)
            self.codec.decode(small[:filled], whole[:filled])
            return filled

        return self._in_batches(refs, into, move)

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        def move(refs: Sequence[Ref], whole: Sequence[memoryview], small: Sequence[memoryview]) -> int:
            self.codec.encode(whole, small)
            return self.inner.write(refs, small)

        return self._in_batches(refs, data, move)

    def close(self) -> None:
        self.inner.close()
        self._scratch.close()

    def _in_batches(
        self,
        refs: Sequence[Ref],
        buffers: Sequence[memoryview],
        move: Callable[[Sequence[Ref], Sequence[memoryview], Sequence[memoryview]], int],
    ) -> int:
        """How many leading chunks were moved.  A failure after some were moved is only a shorter prefix."""
        lengths = [self._length(view) for _, view in zip(refs, buffers, strict=True)]
        done = 0
        for at in range(0, len(refs), _BATCH):
            batch = slice(at, at + _BATCH)
            try:
                with self._borrow(lengths[batch]) as small:
                    moved = move(refs[batch], buffers[batch], small)
            except TierDown:
                if not done:
                    raise
                return done
            done += moved
            if moved < len(small):
                break
        return done

    def _length(self, view: memoryview) -> int:
        """Encoded bytes of a buffer.  Raises ValueError for one that no chunk has."""
        length = self.codec.encoded_bytes(len(view))
        if not 0 < length <= self._scratch.slot_bytes:
            raise ValueError(
                f"buffer of {len(view)} bytes, {length} encoded, at most {self._scratch.slot_bytes}"
            )
        return length

    @contextmanager
    def _borrow(self, lengths: Sequence[int]) -> Iterator[list[memoryview]]:
        slots = self._free.get()
        try:
            yield [self._view(slot, length) for slot, length in zip(slots, lengths, strict=False)]
        finally:
            self._free.put(slots)

    def _view(self, slot: int, length: int) -> memoryview:
        try:
            return self._scratch.view(slot)[:length]
        except ValueError:
            raise TierDown(f"{self.name} tier: closed") from None
