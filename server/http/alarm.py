"""A time limit that is set and cleared very often and rarely expires."""

import asyncio
from collections.abc import Callable
from contextvars import Context


class Alarm:
    """Calls back when it has been set for ``seconds``. For the event loop only.

    However often it is set, it needs one timer of the loop: a timer for each event of a stream
    would add a tenth to the cost of the event.

    Args:
        seconds: how long it must have been set.
        ring: the function to call.
    """

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._seconds = seconds
        self._ring: Callable[[], None] | None = ring
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """Start, or start again, to count the time."""
        self._due = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._call_at(self._due)

    def clear(self) -> None:
        """Do not ring until it is set again."""
        self._due = None

    def close(self) -> None:
        """Never ring again, and release the loop's timer."""
        self._due = self._ring = None  # what rings most often owns this
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._call_at(self._due)
            return
        self._due = None
        if self._ring is not None:
            self._ring()

    def _call_at(self, when: float) -> asyncio.TimerHandle:
        # The loop keeps cancelled timers until they are due. In the caller's context they would
        # keep all that belongs to its request, and its connection, for as long.
        return self._loop.call_at(when, self._look, context=Context())
