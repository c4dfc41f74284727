"""Characters that show as what they are, in terminals, logs and pages."""

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of Unicode: what terminals obey, what reorders or joins the text around it, what
breaks lines, and what has no agreed meaning."""


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


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN
