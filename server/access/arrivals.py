"""Requests of keys whose bodies are still on their way."""

import asyncio
import dataclasses
from collections import Counter

from server.access.store import WINDOW_SECONDS, Standing


class Arrival:
    """One of them, until it is reserved in the store or is over."""

    def __init__(self, arrivals: "Arrivals", key_id: str) -> None:
        self._arrivals, self._key_id = arrivals, key_id
        self._ended = False

    def end(self, *, whole: bool = True) -> None:
        """Count it no more; only the first call matters.

        Args:
            whole: False if its body never came to its end. It has held a place all the same, so it
                counts among the requests of the minute as one that was answered does.
        """
        if not self._ended:
            self._ended = True
            self._arrivals._end(self._key_id, whole)


class Arrivals:
    """How many there are of each key in this process.

    The store learns of a request once its body has been read. What came before it would be bound
    by no limit of its key, and bodies that never end could hold every place that a key may have.
    """

    def __init__(self) -> None:
        self._arriving: Counter[str] = Counter()
        self._broken: Counter[str] = Counter()

    def add(self, key_id: str) -> Arrival:
        """Count one more."""
        self._arriving[key_id] += 1
        return Arrival(self, key_id)

    def added_to(self, found: Standing, key_id: str) -> Standing:
        """A key's standing in the store, and what that does not know of yet."""
        arriving = self._arriving.get(key_id, 0)
        return dataclasses.replace(
            found,
            requests=found.requests + arriving + self._broken.get(key_id, 0),
            running=found.running + arriving,
        )

    def _end(self, key_id: str, whole: bool) -> None:
        _take_one(self._arriving, key_id)
        if not whole:
            self._broken[key_id] += 1
            loop = asyncio.get_running_loop()
            loop.call_later(WINDOW_SECONDS, _take_one, self._broken, key_id)


def _take_one(counter: Counter[str], key_id: str) -> None:
    counter[key_id] -= 1
    if not counter[key_id]:
        del counter[key_id]
