"""Who holds which chunk: the one loop of the system, closed through data in Redis, never through a call.

Workers publish (`IndexWriter`, a thread in vLLM's scheduler process); gateways ask (`IndexReader`) and see
who is alive (`Fleet`).  `index_schema` has the layout both share.

A death or restart is O(1): entries carry the worker's epoch, so when the lease expires or the epoch rises
they are invisible at once; they are swept later.  The index is a hint: a stale yes costs one recompute,
never a wrong answer.
"""

from cacheengine.index_orders import Orders
from cacheengine.index_reader import Fleet, IndexReader
from cacheengine.index_schema import (
    DEVICE,
    DISK,
    FLEET,
    HOST,
    NOTHING,
    SHARED,
    Depths,
    Entry,
    Lease,
    WorkerInfo,
)
from cacheengine.index_writer import IndexWriter, WriterStats

__all__ = [
    "DEVICE",
    "DISK",
    "FLEET",
    "HOST",
    "NOTHING",
    "SHARED",
    "Depths",
    "Entry",
    "Fleet",
    "IndexReader",
    "IndexWriter",
    "Lease",
    "Orders",
    "WorkerInfo",
    "WriterStats",
]
