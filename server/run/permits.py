"""The permits of a server, which bound the requests served at once and share them between keys."""

import asyncio
import math
import time
from collections import deque
from typing import Self

from server.http.errors import ApiError, shutting_down, unavailable
from server.keys.fair_share import FairShare

LONGEST_RETRY = 30
"""Maximum value of ``Retry-After``, in seconds."""
_PACE_OF = 64
"""Number of recent requests from which the rate of released permits is estimated."""


class Permit:
    """The permit of one request; a context manager that releases it.

    Attributes:
        served: whether work for the request has begun. Requests that were rejected before do not
            count in the estimate of how fast permits are released.
    """

    def __init__(self, permits: "Permits", owner: str | None) -> None:
        self._permits = permits
        self._owner = owner
        self._held = 1
        self.served = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._permits._release(self._owner, self._held, served=self.served)

    def acquire(self, sequences: int) -> None:
        """Acquire as many permits as the request will generate sequences.

        Raises:
            ApiError: too few permits are free.
        """
        if sequences > self._held:
            self._permits._acquire(self._owner, sequences - self._held, held=self._held)
            self._held = sequences


class Permits:
    """The permits of a server: one for each sequence that is running or waiting.

    Keys share them according to :class:`~server.keys.fair_share.FairShare`.

    Attributes:
        closed: set once no more permits are given.
    """

    def __init__(self, capacity: int) -> None:
        self._share = FairShare(capacity)
        self._left: deque[float] = deque(maxlen=_PACE_OF)  # in busy seconds
        self._busy = 0.0
        self._busy_since = 0.0
        self._empty = asyncio.Event()
        self._empty.set()
        self.closed = asyncio.Event()

    @property
    def capacity(self) -> int:
        """The total number of permits."""
        return self._share.capacity

    @property
    def in_use(self) -> int:
        """The number of permits in use."""
        return self._share.in_use

    def acquire(self, owner: str | None) -> Permit:
        """Acquire a permit for a request.

        Args:
            owner: the id of the caller's key; None if the server needs no key.

        Raises:
            ApiError: no permit is free, or the server is shutting down.
        """
        if self.closed.is_set():
            raise shutting_down()
        self._acquire(owner, 1)
        return Permit(self, owner)

    def close(self) -> None:
        """Stop giving permits."""
        self.closed.set()

    async def emptied(self, seconds: float) -> bool:
        """Wait at most ``seconds`` until no permit is held, and return whether that happened."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _acquire(self, owner: str | None, number: int, *, held: int = 0) -> None:
        idle = not self.in_use
        if not self._share.acquire(owner, number, held=held):
            raise self._full()
        if idle:
            self._busy_since = time.monotonic()
        self._empty.clear()

    def _release(self, owner: str | None, number: int, *, served: bool) -> None:
        if served:
            self._left.append(self._busy_seconds())
        if self.in_use == number:
            self._busy = self._busy_seconds()
        self._share.release(owner, number)
        if not self.in_use:
            self._empty.set()

    def _busy_seconds(self) -> float:
        """Return the seconds in which a permit was held; idle time would distort the rate."""
        now = time.monotonic() - self._busy_since if self.in_use else 0.0
        return self._busy + now

    def _full(self) -> ApiError:
        return unavailable(
            "The server has as many requests as it can take. Send this one again later.",
            "overloaded",
            self._retry_seconds(),
        )

    def _retry_seconds(self) -> int:
        """Estimate the seconds until a quarter of the permits in use are released."""
        if len(self._left) < 2:
            return 1
        each = (self._busy_seconds() - self._left[0]) / len(self._left)
        return max(1, min(LONGEST_RETRY, math.ceil(each * self.in_use / 4)))
