"""The host tier's memory: one mapping cut into equal slots.  No allocator, so no fragmentation.

Numbers of slots are handed out by the store; the arena only knows where a slot lies.
"""

import ctypes
import errno
import mmap
import os
from contextlib import suppress

PAGE = 4096
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it

# through ctypes and not mmap.madvise(), which would hold the interpreter lock while the kernel clears pages
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """`slots` slots of `slot_bytes` each, every one page aligned (O_DIRECT reads land in them).

    The mapping is private and anonymous: memory is taken page by page at first touch, in huge pages where
    the kernel grants them, and goes back when the process ends, however it ends.  It is left out of core
    dumps: it holds prompts.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Raises ValueError for a size below one, OSError when the address space has no room."""
        if slots < 1 or slot_bytes < 1:
            raise ValueError(f"an arena needs at least one slot of one byte, not {slots} of {slot_bytes}")
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.stride = -(-slot_bytes // PAGE) * PAGE
        self.nbytes = slots * self.stride
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._closed = False
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTDUMP):
            with suppress(OSError):  # a kernel without the feature: slower, not wrong
                self._map.madvise(advice)

    def address(self, slot: int) -> int:
        """Where `slot` begins.  Valid until close().  Raises IndexError, and ValueError when closed."""
        return self._base + self._offset(slot)

    def view(self, slot: int) -> memoryview:
        """The slot's `slot_bytes` bytes, writable.  Raises as address()."""
        start = self._offset(slot)
        return memoryview(self._map)[start : start + self.slot_bytes]

    def populate(self, slot: int) -> bool:
        """Take the slot's memory from the kernel now, changing no byte of it.

        A first touch costs half a copy more, and twenty copies in a virtual machine whose host has yet to
        back the page, so it is paid at start.  Not while serving: the call holds the address space's lock,
        and a thread that is preempted inside it stalls every allocation of the process (seen: decode at a
        hundredth of its speed).
        False where the kernel cannot (before 5.14): the first copy pays, as without this call.
        Raises as address(), and OSError(ENOMEM) when there is no memory to take.
        """
        if _libc.madvise(self.address(slot), self.stride, _MADV_POPULATE_WRITE) == 0:
            return True
        error = ctypes.get_errno()
        if error in (errno.ENOMEM, errno.EFAULT):
            raise OSError(error, os.strerror(error))
        return False

    def close(self) -> None:
        """Give the memory back.  Idempotent.  A view that is still out keeps the mapping alive until it
        goes; an address does not, so whoever copies to addresses stops first."""
        self._closed = True
        with suppress(BufferError):
            self._map.close()

    def _offset(self, slot: int) -> int:
        if self._closed:
            raise ValueError("the arena is closed")
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is not in an arena of {self.slots}")
        return slot * self.stride
