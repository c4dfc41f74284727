"""The permits of a server: how many requests are served at once, shared fairly between keys."""

import asyncio
import math
import time
from collections import deque
from typing import Self

from server.http.errors import ApiError, shutting_down, unavailable
from server.keys.fair_share import FairShare

LONGEST_RETRY = 30
"""The most seconds after which a client is told to try again."""
_PACE_OF = 64
"""Served requests that tell how fast permits are released."""


class Permit:
    """Leave to be served, for one request; a context manager that releases it.

    Attributes:
        served: whether work for the request has begun; what was refused before does not count when
            it is estimated how fast permits are released.
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
            ApiError: there are too few.
        """
        if sequences > self._held:
            self._permits._acquire(self._owner, sequences - self._held, held=self._held)
            self._held = sequences


class Permits:
    """The permits of a server, one for each sequence that is generated or waits to be.

    Keys share them as :class:`~server.keys.fair_share.FairShare` says.

    Attributes:
        closed: set once nobody gets a permit any more.
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
        """How many permits there are."""
        return self._share.capacity

    @property
    def in_use(self) -> int:
        """Permits that are held now."""
        return self._share.in_use

    def acquire(self, owner: str | None) -> Permit:
        """Acquire a permit for a request.

        Args:
            owner: the id of the caller's key; None: it needed none.

        Raises:
            ApiError: there is none, or the server shuts down.
        """
        if self.closed.is_set():
            raise shutting_down()
        self._acquire(owner, 1)
        return Permit(self, owner)

    def close(self) -> None:
        """Let nobody in any more."""
        self.closed.set()

    async def emptied(self, seconds: float) -> bool:
        """Wait until no permit is held, for at most ``seconds``; whether that came."""
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
        """Seconds in which some permit was held; a time without requests says nothing of pace."""
        now = time.monotonic() - self._busy_since if self.in_use else 0.0
        return self._busy + now

    def _full(self) -> ApiError:
        return unavailable(
            "The server has as many requests as it can take. Send this one again later.",
            "overloaded",
            self._retry_seconds(),
        )

    def _retry_seconds(self) -> int:
        """When a quarter of those here will have left, at the pace of late."""
        if len(self._left) < 2:
            return 1
        each = (self._busy_seconds() - self._left[0]) / len(self._left)
        return max(1, min(LONGEST_RETRY, math.ceil(each * self.in_use / 4)))
