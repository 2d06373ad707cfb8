"""What a worker has told the index, so that it can be compared: with Redis, and with the worker's own map."""

from collections.abc import Iterable

from cacheengine.index_schema import Entry
from cacheengine.keys import ChunkKey


class Ledger:
    """By prefix family: chunk → tier bitmap, never 0.  A dict entry a chunk; the keys are the store's."""

    def __init__(self) -> None:
        self._families: dict[ChunkKey, dict[ChunkKey, int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._families.values()))

    def clear(self) -> None:
        self._families.clear()

    def note(self, entries: Iterable[Entry]) -> None:
        """These were told."""
        for root, key, bits in entries:
            family = self._families.setdefault(root, {})
            if bits:
                family[key] = bits
            else:
                family.pop(key, None)
            if not family:
                del self._families[root]

    def differing(self, inventory: Iterable[Entry]) -> list[Entry]:
        """What to tell so that the index says what `inventory` says."""
        held = {(root, key): bits for root, key, bits in inventory}
        told = {(root, key): bits for root, family in self._families.items() for key, bits in family.items()}
        gone = [Entry(root, key, 0) for root, key in told if (root, key) not in held]
        return gone + [Entry(*at, bits) for at, bits in held.items() if told.get(at, 0) != bits]

    def slices(self, size: int) -> list[list[tuple[ChunkKey, list[ChunkKey]]]]:
        """All of it, cut into slices of at most `size` chunks, each as [(root, chunks of that family)]."""
        cut: list[list[tuple[ChunkKey, list[ChunkKey]]]] = []
        left = 0
        for root, family in self._families.items():
            keys = list(family)
            while keys:
                if not left:
                    cut.append([])
                    left = size
                cut[-1].append((root, keys[:left]))
                keys, left = keys[left:], max(0, left - len(keys))
        return cut

    def still(self, root: ChunkKey, keys: Iterable[ChunkKey]) -> list[Entry]:
        """Of these chunks those that are still told, as they are told now."""
        family = self._families.get(root, {})
        return [Entry(root, key, family[key]) for key in keys if key in family]
