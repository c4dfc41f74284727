"""Text of a model on its way to a terminal: harmless, and broken between words."""

import re

from prompt_toolkit.utils import get_cwidth

_TAB = 8
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    ord("\r"): None,
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys(_BIDIRECTIONAL, 0xFFFD),
}
"""Control characters as their pictures: a terminal would obey them. Those that reverse the order of
text would have it show what it does not say."""


def clean(text: str) -> str:
    """The text without what a terminal obeys; piece by piece or whole, it is the same."""
    return text.translate(_SHOWN)


class Wrapper:
    """Breaks lines between words, while the words are still being written.

    A word that grows beyond the edge is taken back and begun again on the next line.

    Args:
        width: of the terminal, in cells; at least 1.
    """

    def __init__(self, width: int) -> None:
        self._width = max(1, width)
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> str:
        """What to write so that ``text`` follows what was written; it must be clean."""
        return "".join(map(self._put, re.findall(r"\s|\S", text)))

    def _put(self, character: str) -> str:
        if character == "\n":
            self._column, self._word = 0, ""
            return "\n"
        if character.isspace():
            self._word = ""
            size = _TAB - self._column % _TAB if character == "\t" else get_cwidth(character)
            if self._column + size > self._width:  # the break stands for it
                self._column = 0
                return "\n"
            self._column += size
            return character
        size, taken = get_cwidth(character), get_cwidth(self._word)
        before = ""
        if self._column + size > self._width:
            if taken < self._column:
                # CSI D: back over the word; CSI K: erase to the end of the line.
                back = f"\x1b[{taken}D\x1b[K" if taken else ""
                before = f"{back}\n{self._word}"
                self._column = taken
            else:
                before, self._column, self._word = "\n", 0, ""
        self._column += size
        # Scripts that are written without spaces break at each character.
        self._word = "" if size == 2 else self._word + character
        return before + character
