"""Memory of this process."""

import ctypes
import gc
import threading
from contextlib import suppress

import psutil


def resident() -> int:
    """Bytes in use, without what the allocator keeps of what was freed."""
    gc.collect()
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


class PeakMemory:
    """Looks again and again how much is in use, and keeps the most."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, process.memory_info().rss)
