"""Memory in huge pages for a model's weights, and in small ones for its KV cache.

Weights are read from end to end again and again; a cache is filled bit by bit.

A processor finds pages of 2 MiB faster than as many of 4 KiB, and reads on without waiting where
one ends. Linux gives them, on most machines, to who asks for them, and only for whole pages of 2
MiB. So what is small shares regions.
"""

import ctypes
import mmap
import threading
from contextlib import suppress

import jax
import numpy as np
from jaxtyping import UInt8

ALIGNMENT = 64
"""Bytes. From an address that is a multiple of it, jax takes an array without a copy."""

_PAGE = 2**21
_REGION = 2**26
"""Bytes that are mapped at a time. What is never written takes no memory."""

_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")


class _Regions:
    """Gives parts of regions. A region is given back when none of its parts is in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: UInt8[np.ndarray, bytes] = np.empty(0, np.uint8)
        self._used = 0

    def take(self, size: int) -> UInt8[np.ndarray, " size"]:
        if size >= _REGION:
            return _map(size)  # the last region is kept, so it must not be a large one
        with self._lock:
            start = self._used + -self._used % ALIGNMENT
            if start + size > len(self._region):
                self._region, start = _map(_REGION), 0
            self._used = start + size
            return self._region[start : start + size]


def _map(size: int) -> UInt8[np.ndarray, " size"]:
    """Memory that begins with a huge page, where the system has them."""
    if not _HUGE_PAGES:
        room = np.empty(size + ALIGNMENT, np.uint8)
        return room[-room.ctypes.data % ALIGNMENT :][:size]
    try:
        mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes cannot be mapped: {error}") from error
    with suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(mapped, np.uint8)  # unmapped with the last array of it
    return room[-room.ctypes.data % _PAGE :][:size]


_regions = _Regions()


def allocate(size: int) -> UInt8[np.ndarray, " size"]:
    """Memory of ``size`` bytes that begins at a multiple of ``ALIGNMENT``. Thread-safe.

    Its content is undefined. For what stays as long as a model: parts of a region keep it all.

    Raises:
        MemoryError: the system has no such memory.
    """
    return _regions.take(size)


def use_small_pages(array: jax.Array) -> None:
    """Let the memory of an array on a CPU come in small pages, as far as it has not been touched.

    XLA asks for huge ones. Linux clears a page when it is first written to, and in a virtual
    machine the host has to find the memory too: several ms for 2 MiB. All layers of a KV cache
    reach the end of theirs in the same step, which then takes a fifth of a second.
    """
    if not _HUGE_PAGES:
        return
    for shard in array.addressable_shards:
        start = shard.data.unsafe_buffer_pointer()
        first, end = start + -start % mmap.PAGESIZE, start + shard.data.nbytes
        if length := max(0, end - first) // mmap.PAGESIZE * mmap.PAGESIZE:
            # A kernel that has no huge pages says so, which is what was wanted.
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_NOHUGEPAGE
            )
