"""Text that others wrote, made safe for terminals, logs and pages."""

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of Unicode: what terminals obey, what reorders or joins the text around it, what
breaks lines, and what has no agreed meaning."""
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SURROGATES = range(0xD800, 0xE000)
_SHOWN: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    ord("\r"): None,
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *_BIDIRECTIONAL, *_SURROGATES), 0xFFFD),
}
"""Control characters as their pictures: a terminal would obey them. Those that reverse the order of
text would have it show what it does not say. Surrogates cannot be written at all."""


def hidden_in(text: str) -> str | None:
    """The first character that does not show as what it is, by code and name; None: all do."""
    for character in text:
        if _is_hidden(character):
            name = unicodedata.name(character, "")
            return f"U+{ord(character):04X}" + (f" ({name})" if name else "")
    return None


def escaped(text: str) -> str:
    """The text with such characters written as Python writes them in a literal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _is_hidden(character) else character
        for character in text
    )


def clean(text: str) -> str:
    """The text without what a terminal obeys; piece by piece or whole, it is the same."""
    return text.translate(_SHOWN)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN
