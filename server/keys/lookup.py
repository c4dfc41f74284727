"""Looks up keys in the store, with a limit on lookups for strings that may not be keys."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from server.http.errors import RETRY_OVERLOADED_SECONDS, unavailable
from server.keys.key import Key
from server.keys.store.threads import StoreThreads

FRESH_SECONDS = 1.0
"""How long a looked-up key is cached, and so how long a change may take to have effect."""
MAX_UNPROVEN = 64
"""Concurrent lookups for strings that are not yet known to be keys."""
_MOST_FRESH = 4096

Result = TypeVar("Result")


class KeyLookup:
    """A cache of recently found keys, and the lookups under way.

    Whoever sends a text that was found to be a key's is looked up whatever else is; a flood of
    other texts fills its own bound only.
    """

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._found: dict[str, tuple[Key, float]] = {}
        self._finding: dict[str, asyncio.Task[Key | None]] = {}
        self._unproven = 0
        self._pepper: bytes | None = None

    async def pepper(self) -> bytes:
        """The secret that key digests are computed with.

        Raises:
            ApiError: the store cannot be used.
        """
        if self._pepper is None:
            self._pepper = await self._threads.call(self._threads.store.pepper)
        return self._pepper

    async def matching(self, key_id: str, text: str) -> Key | None:
        """The key of this id, if ``text`` is that key.

        Raises:
            ApiError: too much is looked up, or the store cannot be used.
        """
        pepper = await self.pepper()
        key, until = self._found.get(key_id, (None, 0.0))
        if key is not None and key.matches(pepper, text):
            if time.monotonic() >= until:
                key = await self._find(key_id)
        else:  # unknown, or another one since: it may be rotated
            finding = self._finding.get(key_id)
            key = None if finding is None else await asyncio.shield(finding)
            if key is None or not key.matches(pepper, text):
                # A lookup that was under way may have begun before the key was made or rotated.
                key = await self.unproven(partial(self._find, key_id))
        return key if key is not None and key.matches(pepper, text) else None

    async def by_id(self, key_id: str, *, anew: bool = False) -> Key | None:
        """The key of this id, which the caller has proven to hold; ``anew`` bypasses the cache.

        Raises:
            ApiError: the store cannot be used.
        """
        key, until = self._found.get(key_id, (None, 0.0))
        return key if time.monotonic() < until and not anew else await self._find(key_id)

    async def unproven(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """The result of a store call that is made for a string that may not be a key.

        Raises:
            ApiError: there are as many as there may be.
        """
        if self._unproven >= MAX_UNPROVEN:
            raise unavailable(
                f"The server is looking up {MAX_UNPROVEN} keys, as many as it does at once. Send "
                "the request again.",
                "overloaded",
                RETRY_OVERLOADED_SECONDS,
            )
        self._unproven += 1
        try:
            return await call()
        finally:
            self._unproven -= 1

    def forget(self, key_id: str) -> None:
        """Look up a key again next time, since it has changed."""
        if found := self._found.get(key_id):
            self._found[key_id] = found[0], 0.0
        self._finding.pop(key_id, None)

    async def _find(self, key_id: str) -> Key | None:
        """Look up a key; callers that ask for it meanwhile share the result."""
        if (finding := self._finding.get(key_id)) is None:
            finding = self._finding[key_id] = asyncio.create_task(self._look_up(key_id))
            finding.add_done_callback(partial(self._end_finding, key_id))
        return await asyncio.shield(finding)

    def _end_finding(self, key_id: str, finding: "asyncio.Task[Key | None]") -> None:
        if self._finding.get(key_id) is finding:
            del self._finding[key_id]
        if not finding.cancelled():
            finding.exception()  # those who wait get it; there may be none any more

    async def _look_up(self, key_id: str) -> Key | None:
        now = time.monotonic()
        key = await self._threads.call(partial(self._threads.store.find_key, key_id))
        if key is None:
            self._found.pop(key_id, None)
        else:
            if len(self._found) >= _MOST_FRESH:
                self._found.clear()
            self._found[key_id] = key, now + FRESH_SECONDS
        return key
