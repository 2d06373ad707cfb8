"""Other ways to keep and ask the same index, for bench_index: what the layout in use is measured against.

Each asks with one blocking client, so that only layout and script differ.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import redis

import cacheengine
from cacheengine.index_schema import chunk_name, field_of
from cacheengine.keys import ChunkKey, Namespace

EPOCH = 1_700_000_000_000  # as long as a real one
BITS = 3
FEW = 4  # keys of the first phase

PACKED = (Path(cacheengine.__file__).parent / "index_lookup.lua").read_text()

# The same search with every name spelled out by the caller.
NAMED = PACKED.replace("return prefix .. string.sub(packed, 16 * i - 15, 16 * i)", "return KEYS[i]").replace(
    "#packed / 16", "#KEYS"
)

# A hash per worker, chunk → bitmap; closure lets each be bisected alone.
PER_WORKER = """
local n, reply = #ARGV[1] / 16, {}
local function has(worker, i)
  return redis.call('HEXISTS', worker, string.sub(ARGV[1], 16 * i - 15, 16 * i)) == 1
end
for w, worker in ipairs(KEYS) do
  local lo, hi = 0, n
  if has(worker, 1) then
    lo = 1
    while lo < hi do
      local mid = math.floor((lo + hi + 1) / 2)
      if has(worker, mid) then lo = mid else hi = mid - 1 end
    end
    reply[#reply + 1] = w
    reply[#reply + 1] = lo
  end
end
return reply
"""

Holdings = dict[str, int]  # worker id → leading chunks
Ask = Callable[[Sequence[ChunkKey]], Holdings]


def plant_chunks(client: redis.Redis, namespace: Namespace, keys: Sequence[ChunkKey], held: Holdings) -> None:
    """As the index has it: a hash per chunk."""
    with client.pipeline(transaction=False) as pipe:
        for worker, depth in held.items():
            for key in keys[:depth]:
                pipe.hset(chunk_name(namespace, keys[0], key), field_of(worker, EPOCH), BITS)
        pipe.execute()


def plant_workers(client: redis.Redis, keys: Sequence[ChunkKey], held: Holdings) -> None:
    """The alternative: an expiring hash per worker."""
    with client.pipeline(transaction=False) as pipe:
        for worker, depth in held.items():
            for key in keys[:depth]:
                pipe.hset(f"w:{worker}", key, BITS)
        pipe.execute()


def _ends(flat: list[list[bytes]]) -> Holdings:
    found: Holdings = {}
    for i in range(0, len(flat), 3):
        for field in flat[i + 2]:
            worker = field.decode().rpartition("@")[0]
            found[worker] = max(found.get(worker, 0), int(flat[i]))  # type: ignore[call-overload]
    return found


def layouts(client: redis.Redis, namespace: Namespace, fleet: Sequence[str]) -> dict[str, Ask]:
    """By name; "packed" is the one in use."""
    packed, named, per_worker = (client.script_load(text) for text in (PACKED, NAMED, PER_WORKER))
    hashes = [f"w:{worker}" for worker in fleet]

    def ask_packed(keys: Sequence[ChunkKey]) -> Holdings:
        return _ends(client.evalsha(packed, 1, chunk_name(namespace, keys[0], keys[0]), b"".join(keys)))  # type: ignore[arg-type]

    def ask_named(keys: Sequence[ChunkKey]) -> Holdings:
        names = [chunk_name(namespace, keys[0], key) for key in keys]
        return _ends(client.evalsha(named, len(names), *names, b""))  # type: ignore[arg-type]

    def ask_few_first(keys: Sequence[ChunkKey]) -> Holdings:
        found = ask_packed(keys[:FEW])
        return ask_packed(keys) if max(found.values(), default=0) == FEW else found

    def ask_workers(keys: Sequence[ChunkKey]) -> Holdings:
        flat: list[int] = client.evalsha(per_worker, len(hashes), *hashes, b"".join(keys))  # type: ignore[assignment]
        return {fleet[w - 1]: depth for w, depth in zip(flat[::2], flat[1::2], strict=True)}

    return {"packed": ask_packed, "named": ask_named, "few first": ask_few_first, "per worker": ask_workers}
