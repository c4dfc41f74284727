"""Structured output: what requests ask for, and the grammar that it comes to.

OpenAI's ``response_format``, vLLM's ``structured_outputs``, and llama.cpp's ``grammar`` and
``json_schema`` say the same things in several ways. One request may use one of them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from inferneo_jax import (
    Constraint,
    ConstraintError,
    choice_constraint,
    gbnf_constraint,
    json_object_constraint,
    json_rule,
    json_schema_constraint,
    lark_constraint,
    regex_constraint,
)
from server.config.validation import FieldError, json_kind
from server.http.errors import ApiError, bad_request
from server.parsers.grammar import Frame

if TYPE_CHECKING:
    from inferneo_jax import LanguageModel

FIELDS = ("response_format", "structured_outputs", "grammar", "json_schema")
"""The parameters that ask for structured output."""
_FORMATS = ("text", "json_object", "json_schema")
_OUTPUTS = ("json", "regex", "choice", "grammar", "json_object")

Kind = Literal["schema", "object", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Wish:
    """The form that a request asks for.

    Attributes:
        field: the path of the field that says so.
        kind: what the value is.
        value: a schema, a pattern, a list of texts or a grammar; None for any JSON object.
        strict: whether all of a schema must be enforced.
        unknown: paths of unknown fields beside it.
    """

    field: str
    kind: Kind
    value: Any = None
    strict: bool = False
    unknown: tuple[str, ...] = ()


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(field, f"is {json_kind(value)}; it must be an object.")
    return value


def _optional(fields: Mapping[str, Any], name: str, kind: type, words: str, path: str) -> Any:
    """A field of this type; None if it is absent or null."""
    value = fields.get(name)
    if value is not None and type(value) is not kind:
        raise FieldError(f"{path}.{name}", f"is {json_kind(value)}; it must be {words}.")
    return value


def _unknown(fields: Mapping[str, Any], known: tuple[str, ...], path: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in sorted(fields.keys() - set(known)))


def response_format(value: Any) -> Wish | None:
    """What a ``response_format`` asks for; None for text.

    Raises:
        FieldError: it is malformed.
    """
    path = "response_format"
    fields = _object(value, path)
    kind = fields.get("type")
    if kind not in _FORMATS:
        shown = repr(kind)[:60] if isinstance(kind, str) else json_kind(kind)
        raise FieldError(f"{path}.type", f"is {shown}; it must be one of {', '.join(_FORMATS)}.")
    if kind == "text":
        return None
    if kind == "json_object":  # llama.cpp takes a schema beside it
        schema = _optional(fields, "schema", dict, "an object", path)
        unknown = _unknown(fields, ("type", "schema"), path)
        if schema is None:
            return Wish(path, "object", unknown=unknown)
        return Wish(f"{path}.schema", "schema", schema, unknown=unknown)
    inner = f"{path}.json_schema"
    described = _object(fields.get("json_schema"), inner)
    schema = _optional(described, "schema", dict, "an object", inner)
    strict = _optional(described, "strict", bool, "true or false", inner)
    for name in ("name", "description"):
        _optional(described, name, str, "a string", inner)
    if schema is None:
        raise FieldError(f"{inner}.schema", "is required.")
    unknown = _unknown(fields, ("type", "json_schema"), path)
    unknown += _unknown(described, ("name", "description", "schema", "strict"), inner)
    return Wish(f"{inner}.schema", "schema", schema, strict=bool(strict), unknown=unknown)


_STRING, _OBJECT, _NULL = {"type": "string"}, {"type": "object"}, {"type": "null"}
RESPONSE_FORMAT = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {"type": {"const": "json_object"}, "schema": {"anyOf": [_OBJECT, _NULL]}},
            "required": ["type"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"anyOf": [_STRING, _NULL]},
                        "description": {"anyOf": [_STRING, _NULL]},
                        "schema": _OBJECT,
                        "strict": {"anyOf": [{"type": "boolean"}, _NULL]},
                    },
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}
"""The JSON schema of :func:`response_format`."""


def structured_outputs(value: Any) -> Wish:
    """What a ``structured_outputs`` asks for.

    Raises:
        FieldError: it is malformed, or asks for none or several forms.
    """
    path = "structured_outputs"
    fields = _object(value, path)
    if fields.get("structural_tag") is not None:
        raise FieldError(
            f"{path}.structural_tag",
            "is not supported; write it as a grammar in structured_outputs.",
        )
    schema = fields.get("json")
    if isinstance(schema, str):
        schema = _parsed(schema, f"{path}.json")
    elif schema is not None:
        _object(schema, f"{path}.json")
    choices = _optional(fields, "choice", list, "a list of strings", path)
    if choices is not None and (not choices or set(map(type, choices)) != {str}):
        raise FieldError(f"{path}.choice", "must hold strings only, at least one.")
    values: dict[str, Any] = {
        "json": schema,
        "regex": _optional(fields, "regex", str, "a string", path),
        "choice": choices,
        "grammar": _optional(fields, "grammar", str, "a string", path),
        "json_object": _optional(fields, "json_object", bool, "true or false", path) or None,
    }
    given = [name for name, each in values.items() if each is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise FieldError(path, f"must hold one of {', '.join(_OUTPUTS)}; it holds {found}.")
    kinds: dict[str, Kind] = {"json": "schema", "json_object": "object"}
    kinds |= {"regex": "regex", "choice": "choice", "grammar": "grammar"}
    (name,) = given
    unknown = _unknown(fields, (*_OUTPUTS, "structural_tag"), path)
    return Wish(f"{path}.{name}", kinds[name], values[name], unknown=unknown)


def _parsed(text: str, field: str) -> dict[str, Any]:
    try:
        return _object(orjson.loads(text), field)
    except orjson.JSONDecodeError as error:
        raise FieldError(field, f"is not valid JSON: {error}.") from None


STRUCTURED_OUTPUTS = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [_OBJECT, _STRING, _NULL]},
        "regex": {"anyOf": [_STRING, _NULL]},
        "choice": {"anyOf": [{"type": "array", "items": _STRING, "minItems": 1}, _NULL]},
        "grammar": {"anyOf": [_STRING, _NULL]},
        "json_object": {"anyOf": [{"type": "boolean"}, _NULL]},
        "structural_tag": _NULL,
    },
}
"""The JSON schema of :func:`structured_outputs`."""


def only(wishes: Mapping[str, Wish | None]) -> Wish | None:
    """The form that a request asks for, by the parameters that may say so.

    Raises:
        FieldError: several of them do.
    """
    given = {name: wish for name, wish in wishes.items() if wish is not None}
    if len(given) > 1:
        one, other, *_ = given
        raise FieldError(other, f"and {one} exclude each other; send one of them.")
    return next(iter(given.values()), None)


def constrains(fields: Mapping[str, Any]) -> bool:
    """Whether a body may ask for structured output, whose grammar takes time to compile."""
    return not fields.keys().isdisjoint(FIELDS)


def constraint_of(
    wish: Wish,
    model: "LanguageModel",
    warnings: list[str],
    *,
    strict: bool,
    frame: Frame | None = None,
) -> Constraint:
    """The grammar that a model's output must match, which is known to compile. Blocks.

    Args:
        wish: what the request asks for.
        model: the model.
        warnings: receives what of a schema is not enforced.
        strict: whether that is an error, as it is under the schema's own ``strict``.
        frame: the reasoning that may come before the answer, and the calls in its place.

    Raises:
        ApiError: the grammar is invalid, not supported or too complex.
    """
    if wish.kind == "grammar" and frame is not None:
        if frame.tools or frame.thinking:
            raise bad_request(
                f"{wish.field} cannot be combined with tools or reasoning. Offer no tools and turn "
                "reasoning off, or ask for a schema, a regular expression or a choice.",
                wish.field,
            )
        frame = None
    return _enforced(
        lambda lenient: _made(wish, frame, lenient=lenient),
        model,
        wish.field,
        warnings,
        strict=strict or wish.strict or wish.kind != "schema",
    )


def calls_constraint(
    frame: Frame, model: "LanguageModel", warnings: list[str], *, strict: bool
) -> Constraint:
    """The grammar of calls of tools, which is known to compile. Blocks.

    Args:
        frame: the tools, and how the model writes calls.
        model: the model.
        warnings: receives what of the tools' schemas is not enforced.
        strict: whether that is an error.

    Raises:
        ApiError: a schema is invalid, not supported or too complex.
    """
    return _enforced(
        lambda lenient: lark_constraint(frame.around("", lenient=lenient)),
        model,
        "tools",
        warnings,
        strict=strict,
    )


def _enforced(
    make: Callable[[bool], Constraint],
    model: "LanguageModel",
    field: str,
    warnings: list[str],
    *,
    strict: bool,
) -> Constraint:
    """Return a constraint that compiles; unless ``strict``, leniently if nothing else does."""

    def compiled(*, lenient: bool) -> Constraint:
        constraint = make(lenient)
        model.grammars.compile(constraint)
        return constraint

    def refusal(error: ConstraintError) -> ApiError:
        return bad_request(f"{field} cannot be enforced: {error}.", field)

    try:
        return compiled(lenient=False)
    except ConstraintError as error:
        if strict:
            raise refusal(error) from None
        reason = error
    try:
        constraint = compiled(lenient=True)
    except ConstraintError as error:
        raise refusal(error) from None
    warnings.append(f"{field} is enforced in part: {reason}.")
    return constraint


def _made(wish: Wish, frame: Frame | None, *, lenient: bool) -> Constraint:
    if frame is not None:
        return lark_constraint(frame.around(_rule(wish, lenient=lenient), lenient=lenient))
    match wish.kind:
        case "schema":
            return json_schema_constraint(wish.value, lenient=lenient)
        case "object":
            return json_object_constraint()
        case "regex":
            return regex_constraint(wish.value)
        case "choice":
            return choice_constraint(wish.value)
        case "grammar":
            return gbnf_constraint(wish.value)


def _rule(wish: Wish, *, lenient: bool) -> str:
    """Return the form that is asked for as the right side of a rule."""
    match wish.kind:
        case "schema":
            return json_rule(wish.value, lenient=lenient)
        case "regex":
            return "/" + re.sub(r"(?<!\\)/", r"\\/", wish.value) + "/"
        case "choice":
            return "(" + " | ".join(map(json.dumps, wish.value)) + ")"
    return json_rule({"type": "object"})
