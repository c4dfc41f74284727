"""A program on a pseudo-terminal."""

import os
import pty
import re
import select
import subprocess
import time

from tests.support.paths import ROOT

SECONDS = 30.0


class Terminal:
    """A program on a pseudo-terminal of 80 columns, by which it is controlled.

    Attributes:
        popen: the process.
    """

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.popen = subprocess.Popen(
            # The first of a session that opens a terminal is controlled by it.
            ["sh", "-c", ': < "$(tty)"; exec "$@"', "sh", *command],
            cwd=ROOT,
            env=env | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._written, self._found = b"", 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        os.close(self._ours)

    @property
    def text(self) -> str:
        """All that it has written, without what moves the cursor, colours and erases."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._written.decode(errors="replace"))

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until what it has written since the last match has one; the match."""
        deadline = time.monotonic() + SECONDS
        while not (match := re.compile(pattern).search(self.text, self._found)):
            assert self._read(deadline), f"it ended: {self.text}"
        self._found = match.end()
        return match

    def ended(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline):  # or it would wait for somebody to read
            pass
        return self.popen.wait(SECONDS)

    def _read(self, deadline: float) -> bytes:
        """More of what it writes; nothing once it has ended."""
        left = max(0.0, deadline - time.monotonic())
        assert select.select([self._ours], [], [], left)[0], f"nothing came after {self.text!r}"
        try:
            piece = os.read(self._ours, 65_536)
        except OSError:  # Linux
            piece = b""
        self._written += piece
        return piece
