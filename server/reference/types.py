"""JSON schemas in words: what a value may be, and its bounds."""

from typing import Any

from server.reference.markdown import anchor, code

Schema = dict[str, Any]

_ANY = "any value"
_LENGTHS = {
    "string": ("minLength", "maxLength", "characters"),
    "array": ("minItems", "maxItems", "items"),
}


def words(schema: Schema, *, null: bool = True) -> str:
    """Such as ``integer, 1 to 256 or "none"``.

    Args:
        schema: of one value.
        null: whether to say that it may be null.
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
    kind = schema.get("type")
    if kind == "array":
        items = words(schema["items"]) if schema.get("items") else ""
        return _bounded(f"array of {items}" if items else "array", schema, kind)
    if kind == "object":
        return _object(schema)
    return _bounded(kind, schema, kind) if isinstance(kind, str) else _ANY


def _object(schema: Schema) -> str:
    values = schema.get("additionalProperties")
    if isinstance(values, dict) and values:
        return f"object of {words(values)}"
    named = [f"`{name}`" for name in schema.get("properties", ())]
    return f"object of {', '.join(named)}" if named else "object"


def _bounded(text: str, schema: Schema, kind: str) -> str:
    low, high, unit = "minimum", "maximum", ""
    if kind in _LENGTHS:
        low, high, unit = _LENGTHS[kind]
    least, most = schema.get(low), schema.get(high)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    unit = f" {unit}" if unit else ""
    if least is not None and most is not None:
        bounds = [f"{_number(least)} to {_number(most)}{unit}"]
    else:
        bounds = [
            f"{word} {_number(bound)}{unit if bound != 1 else unit.removesuffix('s')}"
            for word, bound in (
                ("at least", least),
                ("above", above),
                ("at most", most),
                ("below", below),
            )
            if bound is not None and not (unit and bound == 0)
        ]
    return ", ".join([text, *bounds])


def _number(value: float) -> str:
    """As people write it; powers of two that are a type's end as such."""
    for bits in (31, 32, 63, 64):
        for number, name in ((2**bits, f"2^{bits}"), (2**bits - 1, f"2^{bits} - 1")):
            if abs(value) == number:
                return name if value > 0 else f"-{name}" if name[-2:] != " 1" else f"-({name})"
    return f"{value:g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _or(texts: list[str]) -> str:
    kept = list(dict.fromkeys(texts))
    if len(kept) <= 2 or not any("," in text for text in kept):
        return ", ".join(kept[:-1]) + " or " + kept[-1] if len(kept) > 1 else "".join(kept)
    return "; ".join(kept[:-1]) + "; or " + kept[-1]
