"""Request bodies, limited in size and in how slowly they may arrive."""

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from quart.wrappers.request import Body
from werkzeug.exceptions import RequestEntityTooLarge

from server.http.deadline import Deadline
from server.http.errors import ApiError

DRAIN_SECONDS = 5.0
"""How long an error response waits for the rest of a body that is discarded."""
STALL_SECONDS = 5.0
"""How long a body may make no progress while the server waits for it."""
BODY_BYTES_PER_SECOND = 1024
"""The slowest rate of a body: each second of waiting must be earned by this many bytes."""
_LOOK_SECONDS = 0.5


class LimitedBody(Body):
    """A body that is rejected when it becomes too large or stalls.

    A body that is too large is still read to its end: closing a connection with unread data resets
    it, and the client may lose the response that says why.

    Attributes:
        deadline: the request's deadline, which also limits the body; None if it has none.
        stalled: whether the body was given up because it arrived too slowly.
    """

    def __init__(self, expected: int | None, maximum: int | None) -> None:
        super().__init__(expected, maximum)
        self._left = maximum
        self._too_large = RequestEntityTooLarge(
            f"The request body has more than {maximum} bytes. Send less, or raise "
            "INFERNEO_MAX_BODY_BYTES where the server is started."
        )
        if self._must_raise is not None:
            self._must_raise = self._too_large
        self._answered = False
        self._ended = asyncio.Event()
        self._received = 0
        self.deadline: Deadline | None = None
        self.stalled = False

    @property
    def whole(self) -> bool:
        """Whether the last byte has arrived."""
        return self._ended.is_set()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the last byte and return them all.

        Raises:
            ApiError: the body came too slowly, or the deadline has passed.
            RequestEntityTooLarge: the body has too many bytes.
        """
        yield from self._arrive().__await__()
        return (yield from super().__await__())

    def append(self, data: bytes) -> None:
        """Keep the bytes; drop them once there are too many."""
        self._received += len(data)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0 and self._must_raise is None:
                self._must_raise = self._too_large
                super().set_complete()
        if self._must_raise is None and not self._answered:
            self._data.extend(data)
            self._has_data.set()

    def set_complete(self) -> None:
        """Note that the last byte has arrived."""
        self._ended.set()
        super().set_complete()

    async def drain(self) -> None:
        """Wait a while for the last byte and discard the body, since the response is known."""
        self._answered = True
        self._data.clear()
        if not self.stalled:
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self._ended.wait()

    async def _arrive(self) -> None:
        """Wait while the body makes progress.

        Time is counted in looks, not read from a clock: a machine that stood still for a while has
        not let its clients send either.
        """
        deadline = self.deadline
        budget, seen = STALL_SECONDS, self._received
        while not (self._complete.is_set() or self._must_raise):
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._complete.wait()
                return
            earned = (self._received - seen) / BODY_BYTES_PER_SECOND
            budget, seen = min(STALL_SECONDS, budget + earned), self._received
            budget -= _LOOK_SECONDS
            late = deadline is not None and deadline.remaining() <= 0
            self.stalled = late or budget <= 0
            if late and deadline is not None:
                raise deadline.missed()
            if self.stalled:
                raise ApiError(
                    408,
                    f"The request body came too slowly: after {self._received} bytes it stalled. "
                    f"Send it again, at {BODY_BYTES_PER_SECOND} bytes a second or more and "
                    f"without pauses of {STALL_SECONDS:g} s.",
                    code="body_stalled",
                    headers={"X-Should-Retry": "true"},
                )
