"""Measures how slow the machine is while a test runs, so that time limits can follow it."""

import hashlib
import threading
import time
from typing import Self

_BLOCK = bytes(2**20)
_BLOCKS = 40
_SECONDS = 0.05
"""What the work takes on a core that has nothing else to do, and no more than a slow one needs."""
_PAUSE = 0.4


class Machine:
    """Does a fixed amount of work again and again, as long as it is open, and takes the time."""

    def __init__(self) -> None:
        self._slowest = 1.0
        self._sampled, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._sample, name="calibration", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def seconds(self, idle: float) -> float:
        """How long may take here what takes at most ``idle`` on a machine without other work."""
        assert self._sampled.wait(60)
        return idle * self._slowest

    def _sample(self) -> None:
        while not self._closed.is_set():
            began, work = time.monotonic(), hashlib.blake2b()
            for _ in range(_BLOCKS):
                work.update(_BLOCK)  # without the interpreter's lock, which the test needs
            self._slowest = max(self._slowest, (time.monotonic() - began) / _SECONDS)
            self._sampled.set()
            self._closed.wait(_PAUSE)
