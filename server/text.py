"""Text work off the event loop: templates and tokenizing take milliseconds to seconds."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from server.access.caller import owner
from server.errors import bad_request

INLINE_CHARACTERS = 2000
"""Shorter texts are done at once: that takes less time than a thread takes to answer."""
BUDGET_SECONDS = 30.0

Result = TypeVar("Result")


class TextWork:
    """A small pool of threads for text; a key has one of them at a time, so keys take turns."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Do ``work`` on a text of ``size`` characters, in a thread unless it is short.

        Raises:
            ApiError: it took too long. Its thread goes on until it is done.
        """
        if size <= INLINE_CHARACTERS:
            return work()
        if (name := owner()) is None:
            return await self._in_a_thread(work)
        async with self._turns.setdefault(name, asyncio.Lock()):
            return await self._in_a_thread(work)

    async def _in_a_thread(self, work: Callable[[], Result]) -> Result:
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                return await future
        except TimeoutError:
            raise bad_request(
                f"The text was not read within {BUDGET_SECONDS:.0f} seconds; shorten it."
            ) from None

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
