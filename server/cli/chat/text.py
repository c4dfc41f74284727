"""Lines of text on a terminal, broken between words while they are written."""

import re

from prompt_toolkit.utils import get_cwidth

_TAB = 8
_LONGEST = 1000
"""Characters of a word that is kept whole: marks without width could go on for ever."""


class Wrapper:
    """Breaks lines between words, while the words are still being written.

    A word that grows beyond the edge is taken back and begun again on the next line.

    Args:
        width: of the terminal, in cells; at least 1.
    """

    def __init__(self, width: int) -> None:
        self._width = max(1, width)
        self._column = 0
        self._word, self._taken = "", 0

    def feed(self, text: str) -> str:
        """What to write so that ``text`` follows what was written; it must be clean."""
        return "".join(map(self._put, re.findall(r"\s|\S", text)))

    def _put(self, character: str) -> str:
        if character == "\n":
            self._column, self._word, self._taken = 0, "", 0
            return "\n"
        if character.isspace():
            self._word, self._taken = "", 0
            size = _TAB - self._column % _TAB if character == "\t" else get_cwidth(character)
            if self._column + size > self._width:  # the break stands for it
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
        # Scripts that are written without spaces break at each character.
        if size == 2 or len(self._word) == _LONGEST:
            self._word, self._taken = "", 0
        else:
            self._word, self._taken = self._word + character, self._taken + size
        return before + character
