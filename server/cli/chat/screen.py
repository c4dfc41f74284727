"""What a chat shows: answers as they are written, and lines about them."""

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from server.cli.chat.client import Answer
from server.cli.chat.text import Wrapper
from server.cli.clean import clean

_LOCAL_MODES = 3
"""Where termios(3)'s ``c_lflag`` is in what ``tcgetattr`` gives."""
_REASONS = {
    "stop": "complete",
    "length": "cut: max_tokens, or the model's context, is used up",
    "abort": "cancelled by the server",
    "interrupt": "stopped",
}


class Screen:
    """Where to write.

    Args:
        out: for answers, and in a conversation for all else.
        err: for errors and progress.
    """

    def __init__(self, out: Console, err: Console) -> None:
        self.out, self.err = out, err

    @contextmanager
    def answer(self) -> Iterator["Writer"]:
        """An answer that is being written; what is typed meanwhile is not shown in it."""
        writer = Writer(self.out)
        with _without_echo():
            try:
                yield writer
            finally:
                writer.end()

    def note(self, text: str) -> None:
        """Something beside the conversation."""
        self.out.print(Text(clean(text), style="dim"))

    def warn(self, text: str) -> None:
        """Something that is no part of an answer, where answers may be read by a program."""
        self.err.print(Text(clean(text), style="dim"))

    def show(self, text: str) -> None:
        """What was asked for, by a command."""
        self.out.print(Text(clean(text)))

    def error(self, text: str) -> None:
        """What went wrong."""
        shown = Text.assemble(("error: ", "bold red"), clean(text))
        self.err.print(shown, soft_wrap=not self.err.is_terminal)

    def figures(self, answer: Answer) -> None:
        """How an answer came, in one line."""
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
    """Writes pieces of text; on a terminal lines break between words."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._wrapper = Wrapper(console.width) if console.is_terminal else None
        self._ends_line = True

    def write(self, text: str) -> None:
        """Write a piece, at once."""
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
    """The terminal, or wherever the output goes."""
    return Screen(
        Console(highlight=False, markup=False, emoji=False),
        Console(highlight=False, markup=False, emoji=False, stderr=True),
    )
