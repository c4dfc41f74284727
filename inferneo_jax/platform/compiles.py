"""Counts compilations that nobody announced.

Every shape is compiled before a server is ready. A compilation after that would stall all running
requests for seconds, so it is counted wherever it happens in the process, and a test holds the
count at zero.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax.monitoring

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_lock = threading.Lock()
_announced = threading.local()
_unexpected = 0


@contextmanager
def expected() -> Iterator[None]:
    """Compilations of this thread inside the block are not counted."""
    depth = getattr(_announced, "depth", 0)
    _announced.depth = depth + 1
    try:
        yield
    finally:
        _announced.depth = depth


def num_unexpected() -> int:
    """Compilations so far, in the whole process, outside of ``expected`` blocks."""
    return _unexpected


def _count(event: str, duration_secs: float, **_: object) -> None:
    del duration_secs  # the name is the listener's contract
    global _unexpected
    if event == _COMPILE_EVENT and not getattr(_announced, "depth", 0):
        with _lock:
            _unexpected += 1


jax.monitoring.register_event_duration_secs_listener(_count)
