"""The output of a chat: answers as they are generated, and lines about them."""

import re
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit.utils import get_cwidth
from rich.console import Console
from rich.text import Text

from server.cli.chat.client import Answer
from server.observe.terminal import clean

_LOCAL_MODES = 3
"""Index of termios(3)'s ``c_lflag`` in the result of ``tcgetattr``."""
_REASONS = {
    "stop": "complete",
    "length": "cut: max_tokens, or the model's context, is used up",
    "abort": "cancelled by the server",
    "interrupt": "stopped",
}

_TAB = 8
_LONGEST = 1000
"""Maximum characters of a word that is kept whole; marks without width could go on without end."""


class Screen:
    """Writes the output of a chat.

    Args:
        out: the console for answers, and for everything else in a conversation.
        err: the console for errors and progress.
    """

    def __init__(self, out: Console, err: Console) -> None:
        self.out, self.err = out, err

    @contextmanager
    def answer(self) -> Iterator["Writer"]:
        """Yield the writer of an answer; keys typed in the meantime are not echoed."""
        writer = Writer(self.out)
        with _without_echo():
            try:
                yield writer
            finally:
                writer.end()

    def note(self, text: str) -> None:
        """Write a note beside the conversation."""
        self.out.print(Text(clean(text), style="dim"))

    def warn(self, text: str) -> None:
        """Write a warning where it does not mix with answers that a program may read."""
        self.err.print(Text(clean(text), style="dim"))

    def show(self, text: str) -> None:
        """Write the output of a command."""
        self.out.print(Text(clean(text)))

    def error(self, text: str) -> None:
        """Write an error."""
        shown = Text.assemble(("error: ", "bold red"), clean(text))
        self.err.print(shown, soft_wrap=not self.err.is_terminal)

    def figures(self, answer: Answer) -> None:
        """Write the speed and the end of an answer, in one line."""
        parts = []
        if answer.tokens is not None:
            parts.append(f"{answer.tokens:,} token{'s' * (answer.tokens != 1)}")
        if answer.rate is not None:
            parts.append(f"{answer.rate:,.1f} tokens/s")
        if answer.first is not None:
            parts.append(f"first after {answer.first:.2f} s")
        reason = answer.reason or ""
        parts.append(_REASONS.get(reason, clean(reason)))
        self.note(" · ".join(filter(None, parts)))
        for warning in answer.warnings:
            self.note(f"The server: {warning}")
        self.out.print()


class Writer:
    """Writes pieces of text; on a terminal, lines break between words."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._wrapper = Wrapper(console.width) if console.is_terminal else None
        self._ends_line = True

    def write(self, text: str) -> None:
        """Write a piece immediately."""
        text = clean(text)
        if text:
            self._ends_line = text.endswith("\n")
            self._file.write(self._wrapper.feed(text) if self._wrapper else text)
            self._file.flush()

    def end(self) -> None:
        """Close the last line."""
        if not self._ends_line:
            self._file.write("\n")
            self._file.flush()


@contextmanager
def _without_echo() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = termios.tcgetattr(sys.stdin)
    changed[_LOCAL_MODES] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def terminal() -> Screen:
    """Return the screen of the terminal, or of wherever the output goes."""
    return Screen(
        Console(highlight=False, markup=False, emoji=False),
        Console(highlight=False, markup=False, emoji=False, stderr=True),
    )


class Wrapper:
    """Breaks lines between words, while the words are still being written.

    A word that grows beyond the edge is erased and begun again on the next line.

    Args:
        width: width of the terminal in cells; at least 1.
    """

    def __init__(self, width: int) -> None:
        self._width = max(1, width)
        self._column = 0
        self._word, self._taken = "", 0

    def feed(self, text: str) -> str:
        """Return the characters to write so that ``text`` appears next; it must be clean."""
        return "".join(map(self._put, re.findall(r"\s|\S", text)))

    def _put(self, character: str) -> str:
        if character == "\n":
            self._column, self._word, self._taken = 0, "", 0
            return "\n"
        if character.isspace():
            self._word, self._taken = "", 0
            size = _TAB - self._column % _TAB if character == "\t" else get_cwidth(character)
            if self._column + size > self._width:  # the line break replaces it
                self._column = 0
                return "\n"
            self._column += size
            return character
        # Not the width of the whole word again, which may be of any number of marks without width.
        size, taken = get_cwidth(character), self._taken
        before = ""
        if self._column + size > self._width:
            if taken < self._column:
                # CSI D: back over the word; CSI K: erase to the end of the line.
                back = f"\x1b[{taken}D\x1b[K" if taken else ""
                before = f"{back}\n{self._word}"
                self._column = taken
            else:
                before, self._column, self._word, self._taken = "\n", 0, "", 0
        self._column += size
        # Scripts written without spaces can break at each character.
        if size == 2 or len(self._word) == _LONGEST:
            self._word, self._taken = "", 0
        else:
            self._word, self._taken = self._word + character, self._taken + size
        return before + character
