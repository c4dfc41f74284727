"""How long a text becomes before it is made: what the sandbox of chat templates bounds."""

import re
from typing import Any

from jinja2.exceptions import SecurityError

MAX_CHARACTERS = 8_000_000
"""Longest text a template may render, or make on the way; far above any model's context."""
MAX_BITS = 256
"""Longest product of integers, in bits."""

_NUMBER = re.compile(r"\d+")


def written_size(value: Any) -> int:
    """About the length of a value written out; the walk ends where that is too long anyway.

    Lists may hold one another many times over, so that few of them make an immense text.
    """
    size, left = 0, [value]
    while left and size <= MAX_CHARACTERS:
        item = left.pop()
        if isinstance(item, str):
            size += len(item) + 4
        elif isinstance(item, dict):
            left += item.keys()
            left += item.values()
            size += 2
        elif isinstance(item, list | tuple):
            left += item
            size += 2
        else:
            size += 16
    return size


def product_size(left: Any, right: Any) -> int:
    """The length of ``left * right``."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return written_size(sequence) * max(0, count)
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and left.bit_length() + right.bit_length() > MAX_BITS:
        raise SecurityError("it multiplies numbers that are too large")
    return 0


def formatted_size(pattern: str, arguments: Any) -> int:
    """At least the length of ``pattern`` filled with ``arguments``."""
    if "*" in pattern:
        raise SecurityError("it computes the width of a format")
    widths = _NUMBER.findall(pattern)
    if any(len(width) > 7 for width in widths):
        return MAX_CHARACTERS + 1
    places = pattern.count("%") + pattern.count("{")
    return len(pattern) + sum(map(int, widths)) + places * written_size(arguments)


def replaced_size(text: str, old: Any, new: Any) -> int:
    """At least the length of ``text.replace(old, new)``."""
    if not isinstance(old, str) or not isinstance(new, str):
        return 0
    return len(text) + text.count(old) * len(new)


def joined_size(parts: Any, separator: str) -> int:
    """At least the length of ``separator.join(parts)``."""
    if not isinstance(parts, str | list | tuple | dict):
        raise SecurityError("it joins what is neither a list nor a text")
    return written_size(parts) + len(parts) * len(separator)
