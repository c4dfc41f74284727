"""Tools in requests: what is offered, what is chosen, and earlier calls with their results."""

import json
import re
from collections.abc import Iterator
from typing import Any

from server.config.validation import FieldError, json_kind

MAX_TOOLS = 128
MAX_TOOL_BYTES = 64 * 1024
"""Maximum size of one tool, as JSON."""
MAX_TOOLS_BYTES = 1024 * 1024
"""Maximum size of all tools together, as JSON."""
MAX_SCHEMA_DEPTH = 64
"""Maximum number of objects and lists within each other in a tool."""
TOOL_NAME = "^[a-zA-Z0-9_.-]{1,64}$"
MAX_CALLS = 128
"""Maximum number of calls in one message."""

_NAME = re.compile(TOOL_NAME)
_CHOICES = ("none", "auto", "required")

Tool = dict[str, Any]
"""A tool as OpenAI's API has it: ``{"type": "function", "function": {...}}``."""


def tools_of(value: Any) -> list[Tool]:
    """Return the tools of a request, each with the schema of its arguments.

    Raises:
        FieldError: they are malformed, too many or too large.
    """
    if not isinstance(value, list):
        raise FieldError("tools", f"is {json_kind(value)}; it must be a list of tools.")
    if len(value) > MAX_TOOLS:
        raise FieldError("tools", f"holds {len(value)} tools; it may hold at most {MAX_TOOLS}.")
    tools, names, total = [], set(), 0
    for i, each in enumerate(value):
        tool, size = _tool(each, f"tools[{i}]")
        name, total = tool["function"]["name"], total + size
        if name in names:
            raise FieldError(f"tools[{i}].function.name", f"is {name!r}, as another tool's is.")
        if total > MAX_TOOLS_BYTES:
            raise FieldError(
                "tools", f"takes more than {MAX_TOOLS_BYTES} bytes as JSON; offer fewer tools."
            )
        names.add(name)
        tools.append(tool)
    return tools


def _tool(value: Any, field: str) -> tuple[Tool, int]:
    """Return a tool, and its size in bytes."""
    if not isinstance(value, dict):
        raise FieldError(field, f"is {json_kind(value)}; it must be an object.")
    if (kind := value.get("type")) != "function":
        shown = repr(kind)[:60] if isinstance(kind, str) else json_kind(kind)
        raise FieldError(f"{field}.type", f"is {shown}; tools of type 'function' are supported.")
    if not isinstance(function := value.get("function"), dict):
        raise FieldError(f"{field}.function", f"is {json_kind(function)}; it must be an object.")
    _check_name(function.get("name"), f"{field}.function.name")
    for key, types, words in (
        ("description", str, "a string"),
        ("parameters", dict, "a JSON schema, as an object"),
        ("strict", bool, "true or false"),
    ):
        if not isinstance(given := function.get(key), types | None):
            raise FieldError(
                f"{field}.function.{key}", f"is {json_kind(given)}; it must be {words}."
            )
    if _depth_exceeds(function, MAX_SCHEMA_DEPTH):
        raise FieldError(
            f"{field}.function",
            f"is nested too deeply; it may hold {MAX_SCHEMA_DEPTH} levels of objects and lists.",
        )
    if (size := len(json.dumps(function))) > MAX_TOOL_BYTES:
        raise FieldError(
            f"{field}.function",
            f"takes {size} bytes as JSON; at most {MAX_TOOL_BYTES} are allowed.",
        )
    kept = {key: value for key, value in function.items() if value is not None}
    kept.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": kept}, size


def shown(tool: Tool) -> Tool:
    """Return a tool as chat templates get it."""
    function = {key: value for key, value in tool["function"].items() if key != "strict"}
    return tool | {"function": function}


def _check_name(name: Any, field: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name)[:60] if isinstance(name, str) else json_kind(name)
        raise FieldError(
            field, f"is {shown}; it must have 1 to 64 letters, digits, '_', '.' and '-'."
        )


def _depth_exceeds(value: Any, bound: int) -> bool:
    """Return whether more than ``bound`` objects and lists are within each other."""
    level: list[Any] = [value]
    for _ in range(bound + 1):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def tool_choice_of(value: Any) -> str | dict[str, Any]:
    """Return which tools may be called: a word, or the object that names one.

    Raises:
        FieldError: it is neither.
    """
    if isinstance(value, str) and value in _CHOICES:
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        if not isinstance(function := value.get("function"), dict):
            raise FieldError(
                "tool_choice.function", f"is {json_kind(function)}; it must be an object."
            )
        _check_name(function.get("name"), "tool_choice.function.name")
        return value
    shown = repr(value)[:60] if isinstance(value, str) else json_kind(value)
    raise FieldError(
        "tool_choice",
        f"is {shown}; it must be one of {', '.join(_CHOICES)}, or "
        '{"type": "function", "function": {"name": "..."}}.',
    )


def calls_of(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant's message with their arguments as objects.

    Raises:
        FieldError: they are malformed, or too many.
    """
    if not isinstance(value, list) or not set(map(type, value)) <= {dict}:
        raise FieldError(field, f"is {json_kind(value)}; it must be a list of objects.")
    if len(value) > MAX_CALLS:
        raise FieldError(field, f"holds {len(value)} calls; it may hold at most {MAX_CALLS}.")
    return list(_calls(value, field))


def _calls(value: list[dict[str, Any]], field: str) -> Iterator[dict[str, Any]]:
    for i, call in enumerate(value):
        path = f"{field}[{i}].function"
        if not isinstance(function := call.get("function"), dict):
            raise FieldError(path, f"is {json_kind(function)}; it must be an object.")
        if not isinstance(name := function.get("name"), str):
            raise FieldError(f"{path}.name", f"is {json_kind(name)}; it must be a string.")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | dict | None):
            raise FieldError(
                f"{path}.arguments", f"is {json_kind(arguments)}; it must be JSON in a string."
            )
        if not isinstance(call.get("id"), str | None):
            raise FieldError(
                f"{field}[{i}].id", f"is {json_kind(call['id'])}; it must be a string."
            )
        yield call | {"function": function | {"arguments": _arguments(arguments)}}


def _arguments(value: str | dict[str, Any] | None) -> str | dict[str, Any]:
    """Return arguments as an object; as they are if they are none, since models err."""
    if isinstance(value, dict):
        return value
    if not value:
        return {}
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value
