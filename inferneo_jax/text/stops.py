"""Stop strings in streamed text."""

import re
from collections.abc import Sequence

from inferneo_jax.errors import RequestError


class StopMatcher:
    """Passes text on until it contains one of ``stops``.

    The stop that ends first wins; of several that end together, the longest. Only text that may be
    the beginning of a stop is held back. The result does not depend on how the text is divided into
    pieces.

    Attributes:
        matched: the stop that was found, or None.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Search for ``stops``.

        Args:
            stops: non-empty strings, or none at all.
            include: whether to pass on the stop itself as well.

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
        # Nearly all text has no stop's first character, which one search in C detects.
        firsts = "".join(sorted({re.escape(stop[0]) for stop in self._stops}))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def push(self, text: str) -> str:
        """Take the next piece and return the text that can be shown; "" after a match."""
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
            # A later end than the earliest one so far does not matter.
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
        """Return the text held back, which is no stop, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str) -> int:
        """The start of the longest suffix of ``text`` that begins a stop."""
        assert self._first is not None
        for match in self._first.finditer(text, max(0, len(text) - self._longest + 1)):
            start = match.start()
            rest = text[start:]
            if any(stop.startswith(rest) for stop in self._stops):
                return start
        return len(text)
