"""Pydantic's findings as one sentence that names the field, the value and the bound."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

_LONGEST_VALUE = 60

_KINDS = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number",
    "finite_number": "a finite number",
    "int": "an integer",
    "list": "a list",
    "model": "an object",
    "string": "a string",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


class FieldError(ValueError):
    """What a validator of ours found; the text begins with the field's path."""

    def __init__(self, field: str, finding: str) -> None:
        super().__init__(f"{field} {finding}")
        self.field = field


def field_path(location: Sequence[int | str]) -> str | None:
    """A location as clients write it: ``messages[0].content``; None for the body itself."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None


def field_of(error: ErrorDetails) -> str | None:
    """The path of the field at fault."""
    cause = error.get("ctx", {}).get("error")
    return cause.field if isinstance(cause, FieldError) else field_path(error["loc"])


def describe(error: ErrorDetails, name: str | None = None) -> str:
    """One sentence about the first thing that is wrong.

    Args:
        error: one of ``ValidationError.errors()``.
        name: what to call the field; its path in the body by default.
    """
    field = name or field_path(error["loc"]) or "The request body"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{field} is required."
    if kind == "value_error":  # a validator of ours, which names its field itself
        return str(context["error"])
    value = _shown(error["input"])
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{field} is {value}; it must be {word} {context[key]:g}."
    if kind == "literal_error":
        return f"{field} is {value}; it must be {context['expected']}."
    if kind in ("string_too_short", "too_short"):
        return f"{field} is too short; it must hold at least {context['min_length']}."
    if kind in ("string_too_long", "too_long"):
        return f"{field} is too long; it may hold at most {context['max_length']}."
    stem = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if stem in _KINDS:
        return f"{field} is {value}; it must be {_KINDS[stem]}."
    return f"{field} is {value}; {error['msg'][:1].lower()}{error['msg'][1:]}."


def json_kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list"}
    word = kinds.get(type(value), "object")
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _shown(value: Any) -> str:
    """A scalar as it was sent, cut to a readable length; of anything else only its kind."""
    if not isinstance(value, str | int | float | bool):
        return json_kind(value)
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
