"""Text work off the event loop: parsing, validation, templates and tokenizing."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import TypeVar
from weakref import WeakValueDictionary

from server.http.deadline import Deadline
from server.http.errors import bad_request, unavailable

INLINE_BYTES = 2000
"""Smaller bodies are handled on the event loop, which is faster than switching to a thread."""
LARGE_BYTES = 64 * 1024
"""Work on larger bodies always leaves one thread free for smaller work."""
MAX_QUEUED_BYTES = 32 * 2**20
"""Maximum bytes that wait for a thread for one key, or for all callers without a key."""
BUDGET_SECONDS = 30.0
"""Time limit for the work itself."""
WAIT_SECONDS = 30.0
"""Time limit for waiting for a thread, unless the request's deadline is earlier."""
RETRY_SECONDS = 5
_THREADS = 2

Result = TypeVar("Result")


class CpuPool:
    """A small pool of threads for text work.

    A key uses at most one thread at a time, so that keys take turns, and large texts never occupy
    all threads. A turn ends when its thread finishes, even if its request ended earlier.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")
        self._threads = asyncio.Semaphore(_THREADS)
        self._large = asyncio.Semaphore(_THREADS - 1)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._queued: Counter[str | None] = Counter()

    async def run(
        self,
        size: int,
        work: Callable[[], Result],
        *,
        owner: str | None = None,
        deadline: Deadline | None = None,
        inline: bool = True,
    ) -> Result:
        """Do ``work`` for a request, in a thread unless the request is small.

        Args:
            size: size of the whole body, or of the data to be written, in bytes.
            work: runs with the context variables of the logger.
            owner: the id of the caller's key; None if it has no key.
            deadline: the deadline of the request for waiting and work; None if it has none.
            inline: whether small work may run on the event loop; False if it may block.

        Raises:
            ApiError: the queue is full, or the time limit or deadline has passed. A thread that has
                started runs to its end.
        """
        if inline and size <= INLINE_BYTES:
            return work()
        held = await self._turn(size, owner, deadline)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, copy_context().run, work)

        def end(done: asyncio.Future[Result]) -> None:
            held.close()
            if not done.cancelled():
                done.exception()  # the caller may have left

        future.add_done_callback(end)
        until = loop.time() + BUDGET_SECONDS
        if deadline is not None:
            until = min(until, deadline.at)
        try:
            async with asyncio.timeout_at(until):
                return await asyncio.shield(future)
        except TimeoutError:
            if deadline is not None and until == deadline.at:
                raise deadline.missed() from None
            raise bad_request(
                f"The text was not read within {BUDGET_SECONDS:.0f} seconds; shorten it."
            ) from None
        finally:
            del future  # otherwise it and the failure's traceback would form a reference cycle

    async def _turn(self, size: int, owner: str | None, deadline: Deadline | None) -> ExitStack:
        """Wait for the key's turn and for a thread; closing the result releases both."""
        if self._queued[owner] and self._queued[owner] + size > MAX_QUEUED_BYTES:
            raise self._overloaded()
        locks: list[asyncio.Lock | asyncio.Semaphore] = []
        if owner is not None:
            locks.append(self._turns.setdefault(owner, asyncio.Lock()))
        if size > LARGE_BYTES:
            locks.append(self._large)
        locks.append(self._threads)
        until = asyncio.get_running_loop().time() + WAIT_SECONDS
        if deadline is not None:
            until = min(until, deadline.at)
        self._queued[owner] += size
        try:
            with ExitStack() as held:
                async with asyncio.timeout_at(until):
                    for lock in locks:
                        await lock.acquire()
                        held.callback(lock.release)
                return held.pop_all()
        except TimeoutError:
            if deadline is not None and until == deadline.at:
                raise deadline.missed() from None
            raise self._overloaded() from None
        finally:
            self._queued[owner] -= size
            if not self._queued[owner]:
                del self._queued[owner]

    def _overloaded(self) -> Exception:
        return unavailable(
            "The server has as many texts to read as it can take. Send this request again later.",
            "overloaded",
            RETRY_SECONDS,
        )

    def close(self) -> None:
        """Shut down the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
