"""Text of a model, a file or another server on its way to a terminal: nothing in it is obeyed."""

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


def clean(text: str) -> str:
    """The text without what a terminal obeys; piece by piece or whole, it is the same."""
    return text.translate(_SHOWN)
