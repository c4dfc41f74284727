"""Text that grows at its end, read by generators that yield where they need more of it.

A generator decides nothing from where the text happens to end, so what is read does not depend on
the pieces in which the text arrived.
"""

import re
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Step = Generator[None, None, Result]
"""Reads something; yields whenever it needs more text than there is."""

MAX_CALL = 256 * 1024
"""Maximum length of a call, in characters; it is held back until it is complete."""
MAX_NAME = 256
"""Maximum length of what stands before the arguments of a call, and of the name of one."""

_SPACE = re.compile(r"\s*")
_OUTSIDE_STRINGS = re.compile(r"""["'()\[\]{}]""")
_OPENING, _CLOSING = "([{", ")]}"


class MalformedError(Exception):
    """The text is not what was to be read."""


class TooLongError(MalformedError):
    """What was to be read takes more than :data:`MAX_CALL`."""


class CutError(Exception):
    """The text has ended in the middle of what was to be read."""


class Reader:
    """The text, and how far it has been read.

    Attributes:
        text: what has arrived and may still be needed.
        at: the position in it up to which it has been read.
        ended: whether nothing more will arrive.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def forget(self) -> None:
        """Drop what has been read."""
        self.text = self.text[self.at :]
        self.at = 0

    def more(self) -> Step[None]:
        """Wait for more of what began where :meth:`forget` was called last.

        Raises:
            CutError: the text has ended.
            TooLongError: there is more than anything may take.
        """
        if self.ended:
            raise CutError
        if len(self.text) > MAX_CALL:
            raise TooLongError
        yield

    def next_of(self, *literals: str) -> Step[str | None]:
        """Return the first of ``literals`` that comes next; None if none of them can."""
        longest = max(map(len, literals))
        while True:
            ahead = self.text[self.at : self.at + longest]
            for literal in literals:
                if ahead.startswith(literal):
                    return literal
            if self.ended or not any(literal.startswith(ahead) for literal in literals):
                return None
            yield from self.more()

    def skip_space(self) -> Step[None]:
        """Read white space, if any."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None, "the pattern matches nothing at all, too"
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return
            yield from self.more()

    def expect(self, *literals: str) -> Step[str]:
        """Read and return one of ``literals``.

        Raises:
            MalformedError: something else comes next.
            CutError: the text has ended before that is known.
        """
        found = yield from self.next_of(*literals)
        if found is None:
            rest = self.text[self.at :]
            cut = self.ended and any(literal.startswith(rest) for literal in literals)
            raise CutError if cut else MalformedError
        self.at += len(found)
        return found

    def skip(self, literal: str) -> Step[None]:
        """Read a literal and white space before it; read nothing if it does not come next."""
        start = self.at
        yield from self.skip_space()
        if (yield from self.next_of(literal)) is None:
            self.at = start
        else:
            self.at += len(literal)

    def until(self, *ends: str, limit: int = MAX_CALL) -> Step[str]:
        """Read up to the first of ``ends``, and return what was read.

        Raises:
            MalformedError: none of them comes within ``limit`` characters.
            CutError: the text ends before any of them.
        """
        start = searched = self.at
        longest = max(map(len, ends))
        while True:
            found = [at for end in ends if (at := self.text.find(end, searched)) >= 0]
            if found and min(found) <= start + limit:
                self.at = min(found)
                return self.text[start : self.at]
            if len(self.text) - start > limit + longest:
                raise MalformedError
            searched = max(start, len(self.text) - longest + 1)
            yield from self.more()

    def brackets(self, quotes: str = '"') -> Step[str]:
        """Read from a bracket to its counterpart, outside of strings, and return all of it.

        Args:
            quotes: the characters that begin and end strings.

        Raises:
            MalformedError: there is no bracket here, or it is too long.
            CutError: the text ends before its counterpart.
        """
        start = at = self.at
        depth, quote = 0, ""
        while True:
            if quote:
                at, quote = self._in_string(at, quote)
            elif (mark := _OUTSIDE_STRINGS.search(self.text, at)) is None:
                at = len(self.text)
            else:
                at = mark.end()
                if mark[0] in _OPENING:
                    depth += 1
                elif mark[0] in _CLOSING:
                    depth -= 1
                elif mark[0] in quotes:
                    quote = mark[0]
                if depth < 1:
                    if depth < 0 or mark[0] not in _CLOSING:
                        raise MalformedError
                    self.at = at
                    return self.text[start:at]
                continue
            if not quote and at < len(self.text):
                continue
            yield from self.more()

    def _in_string(self, at: int, quote: str) -> tuple[int, str]:
        """Read on in a string; return how far, and the quote that still has to end it."""
        while True:
            end, escape = self.text.find(quote, at), self.text.find("\\", at)
            if end >= 0 and (escape < 0 or end < escape):
                return end + 1, ""
            if escape < 0:
                return len(self.text), quote
            if escape + 1 == len(self.text):
                return escape, quote  # what it escapes has not arrived
            at = escape + 2
