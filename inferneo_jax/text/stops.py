"""Stop strings in text that comes in pieces."""

import re
from collections.abc import Sequence

from inferneo_jax.errors import RequestError


class StopMatcher:
    """Passes text on until one of ``stops`` is complete.

    The stop that completes first wins, and of those that complete together the longest. Text that
    may be the beginning of a stop is held back, and no more than that; what is returned and matched
    does not depend on how the text was cut into pieces.

    Attributes:
        matched: the stop that was found, or None so far.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Watch for ``stops``.

        Args:
            stops: none, or non-empty strings.
            include: whether the stop itself is part of the text passed on.

        Raises:
            RequestError: one of the stops is empty.
        """
        if "" in stops:
            raise RequestError("stop holds an empty string; leave it out", "stop")
        self.matched: str | None = None
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._held = ""
        self._longest = max(map(len, self._stops), default=0)
        # Nearly all text holds no stop's first character, which one search in C finds out.
        firsts = "".join(sorted({re.escape(stop[0]) for stop in self._stops}))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def push(self, text: str) -> str:
        """Take the next piece; returns what is safe to show, "" once a stop has matched."""
        if self._first is None:
            return text
        if self.matched is not None:
            return ""
        if self._held:
            text = self._held + text
        elif self._first.search(text) is None:
            return text
        end, length, found = len(text) + 1, 0, ""
        for stop in self._stops:
            # No need to look beyond the earliest end known.
            start = text.find(stop, 0, end)
            if start >= 0 and (start + len(stop), -len(stop)) < (end, -length):
                end, length, found = start + len(stop), len(stop), stop
        if found:
            self.matched = found
            self._held = ""
            return text[: end if self._include else end - length]
        cut = self._begins(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, at the end of the stream: it turned out to be no stop."""
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str) -> int:
        """Where the earliest suffix of ``text`` that begins a stop starts."""
        assert self._first is not None
        for match in self._first.finditer(text, max(0, len(text) - self._longest + 1)):
            start = match.start()
            rest = text[start:]
            if any(stop.startswith(rest) for stop in self._stops):
                return start
        return len(text)
