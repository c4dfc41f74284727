"""JSON schemas in words: the type of a value, and its bounds."""

from typing import Any

from server.cli.reference.markdown import anchor, code

Schema = dict[str, Any]


def words(schema: Schema, *, null: bool = True) -> str:
    """Describe a schema, such as ``integer, 1 to 256`` or ``array (at most 16) of string``.

    Args:
        schema: the schema of one value.
        null: whether to say that the value may be null.
    """
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}]({anchor(name)})"
    if "anyOf" in schema:
        options = [each for each in schema["anyOf"] if null or each != {"type": "null"}]
        return _or([words(each, null=null) for each in options])
    if "const" in schema:
        return code(schema["const"])
    if "enum" in schema:
        return _or([code(value) for value in schema["enum"]])
    match schema.get("type"):
        case "array":
            bounds = _range(schema.get("minItems"), schema.get("maxItems"))
            items = f" of {words(schema['items'])}" if schema.get("items") else ""
            return f"array ({bounds}){items}" if bounds else f"array{items}"
        case "object":
            return _object(schema)
        case "string":
            bounds = _range(schema.get("minLength"), schema.get("maxLength"))
            unit = "" if bounds in ("", "not empty") else " characters"
            return ", ".join(filter(None, ["string", bounds + unit]))
        case str(kind):
            return ", ".join(filter(None, [kind, _bounds(schema, whole=kind == "integer")]))
    return "any value"


def _object(schema: Schema) -> str:
    values = schema.get("additionalProperties")
    if isinstance(values, dict) and values:
        return f"object of {words(values)}"
    named = [f"`{name}`" for name in schema.get("properties", ())]
    return f"object of {', '.join(named)}" if named else "object"


def _bounds(schema: Schema, *, whole: bool) -> str:
    """Describe the bounds of a number."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if whole and below is not None:
        high, below = below - 1, None
    if above is not None and high is not None:
        return f"above {_number(above)}, to {_number(high)}"
    texts = [span(low, high)]
    texts += [
        f"{word} {_number(bound)}"
        for word, bound in (("above", above), ("below", below))
        if bound is not None
    ]
    return ", ".join(filter(None, texts))


def _range(least: int | None, most: int | None) -> str:
    """Describe the bounds of a length."""
    return "not empty" if (least, most) == (1, None) else span(least or None, most)


def span(low: float | None, high: float | None) -> str:
    """Describe inclusive bounds; an empty string if there are none."""
    if low is not None and high is not None:
        return f"{_number(low)} to {_number(high)}"
    if low is not None:
        return f"at least {_number(low)}"
    return "" if high is None else f"at most {_number(high)}"


def _number(value: float) -> str:
    """Format a number for people; the limits of integer types as powers of two."""
    for bits in (31, 32, 63, 64):
        if value == 2**bits - 1:
            return f"2^{bits} - 1"
        if value == -(2**bits):
            return f"-2^{bits}"
    return f"{value:g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _or(texts: list[str]) -> str:
    *rest, last = dict.fromkeys(texts)
    if not rest:
        return last
    between = "; " if any("," in text for text in (*rest, last)) else ", "
    return between.join(rest) + f"{between if between == '; ' else ' '}or {last}"
