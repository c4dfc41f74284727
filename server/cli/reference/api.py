"""``api.md``: every endpoint, generated from the OpenAPI document that the server sends."""

import json
from collections.abc import Iterator
from typing import Any

from server.api.openapi import document
from server.cli.reference.markdown import anchor, code, fence, join, table
from server.cli.reference.types import Schema, words
from server.endpoints import ENDPOINTS

_ADDRESS = "http://127.0.0.1:8000"
_EVENTS = "text/event-stream"
_ABOUT = f"""# API reference

Every endpoint of the server, with all that it takes and gives. A server has the same as an OpenAPI
3.1 document at `/openapi.json`, and at `/docs` to try out in a browser. [api.md](../api.md) says
more about streams, WebSockets and errors.

The examples ask a server at `{_ADDRESS}`, where `make serve` starts one. Where a table shows no
default, the words say what holds when the field is left out."""


def api_page() -> str:
    """Return the text of the page."""
    found = document(ENDPOINTS)
    operations = [
        (method.upper(), path, operation)
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    ]
    usual = _usual(found)
    parts = [_ABOUT, found["info"]["description"], _contents(operations)]
    for tag in found["tags"]:
        parts += [f"## {tag['name'].title()}", tag["description"]]
        for method, path, operation in operations:
            if tag["name"] in operation["tags"]:
                parts += _operation(method, path, operation, usual, found["components"])
    parts += ["## Headers", *_headers(found), "## Errors", *_errors(usual), "## Objects"]
    return join([*parts, *_objects(found)])


def _contents(operations: list[tuple[str, str, Any]]) -> str:
    rows = [
        (f"[`{method} {path}`]({anchor(f'{method} {path}')})", operation["summary"])
        for method, path, operation in operations
    ]
    return table(("endpoint", ""), rows)


def _usual(found: Schema) -> dict[str, Schema]:
    """Return the errors that have the same meaning for every endpoint."""
    meanings: dict[str, list[Schema]] = {}
    for methods in found["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    meanings.setdefault(status, []).append(response)
    return {status: max(each, key=each.count) for status, each in sorted(meanings.items())}


def _operation(
    method: str, path: str, operation: Schema, usual: dict[str, Schema], components: Schema
) -> Iterator[str]:
    yield f"### `{method} {path}`"
    yield f"{operation['summary']}. {operation.get('description', '')}".rstrip()
    own = [each for each in operation["parameters"] if "$ref" not in each]
    yield table(
        ("parameter", "in", "type and bounds", "meaning"),
        (
            (f"`{each['name']}`", each["in"], words(each["schema"]), each["description"])
            for each in own
        ),
    )
    body = operation.get("requestBody", {"content": {}})["content"].get("application/json")
    if body:
        for schema in body["schema"].get("anyOf", [body["schema"]]):
            name = schema["$ref"].rsplit("/", 1)[1]
            yield _parameters(components["schemas"][name])
    yield fence("bash", _curl(method, path, own, body))
    answers, usually = [], []
    for status, response in operation["responses"].items():
        if usual.get(status) == response:
            usually.append(status)
        else:
            answers.append((status, _contents_of(response), _meaning(response)))
    yield table(("status", "body", "meaning"), answers)
    names = [each["$ref"].rsplit("/", 1)[1] for each in operation["parameters"] if "$ref" in each]
    spelled = [components["parameters"][name]["name"] for name in names]
    yield (
        f"[Errors](#errors): {', '.join(usually)}. "
        f"[Headers](#headers): {', '.join(f'`{name}`' for name in spelled)}."
    )


def _parameters(schema: Schema) -> str:
    """Return the table of a body's parameters, required ones first."""
    required = schema.get("required", ())
    rows = [
        (
            f"`{name}`",
            words(field, null=False),
            "required" if name in required else _default(field),
            field.get("description", ""),
        )
        for name, field in schema["properties"].items()
    ]
    rows.sort(key=lambda row: row[2] != "required")
    return table(("field", "type and bounds", "default", "meaning"), rows)


def _default(field: Schema) -> str:
    return "" if field.get("default") is None else code(field["default"])


def _curl(method: str, path: str, own: list[Schema], body: Schema | None) -> str:
    for each in own:
        value = each["schema"].get("enum", [f"${each['name'].upper()}"])[-1]
        path = path.replace(f"{{{each['name']}}}", value)
    words = ["curl"]
    if method not in ("GET", "POST") or (method == "POST" and not body):
        words.append(f"-X {method}")
    words.append(f"{_ADDRESS}{path}")
    if path.startswith("/admin"):
        words.append('-H "Authorization: Bearer $ADMIN"')
    line = " ".join(words)
    if body:
        sent = json.dumps(body["example"], ensure_ascii=False)
        line += f" -H 'Content-Type: application/json' \\\n  -d '{sent}'"
    return line


def _contents_of(response: Schema) -> str:
    shown = []
    for kind, media in response["content"].items():
        if kind == _EVENTS:
            event = media["schema"]["properties"]["data"]["else"]["contentSchema"]["anyOf"][0]
            shown.append(f"events of {words(event)}")
        elif kind == "application/json":
            shown.append(words(media["schema"]))
        else:
            shown.append(f"`{kind}`")
    return ", ".join(shown)


def _meaning(response: Schema) -> str:
    names = [name for name in response["headers"] if name != "X-Request-Id"]
    told = f" With {', '.join(f'`{name}`' for name in names)}." if names else ""
    return response["description"] + told


def _headers(found: Schema) -> Iterator[str]:
    components = found["components"]
    yield "A request may carry:"
    yield table(
        ("header", "type and bounds", "meaning"),
        (
            (f"`{each['name']}`", words(each["schema"]), each["description"])
            for each in components["parameters"].values()
        ),
    )
    yield "Every response carries `X-Request-Id`; those that say so carry others, too:"
    yield table(
        ("header", "meaning"),
        ((f"`{name}`", each["description"]) for name, each in components["headers"].items()),
    )
    yield "Answers to a key say how its limits stand: see [keys.md](../keys.md#limits)."


def _errors(usual: dict[str, Schema]) -> Iterator[str]:
    body = f"[Error]({anchor('Error')})"
    yield f"All but those that an endpoint describes itself have the body {body}."
    rows = [(status, _meaning(response)) for status, response in usual.items()]
    yield table(("status", "meaning"), rows)
    yield "Which codes there are: [api.md](../api.md#errors)."


def _objects(found: Schema) -> Iterator[str]:
    """Yield the sections of the objects within answers and bodies."""
    bodies = {
        schema["$ref"].rsplit("/", 1)[1]
        for methods in found["paths"].values()
        for operation in methods.values()
        if "requestBody" in operation
        for media in operation["requestBody"]["content"].values()
        for schema in media["schema"].get("anyOf", [media["schema"]])
    }
    for name, schema in found["components"]["schemas"].items():
        if name in bodies:
            continue
        yield f"### {name}"
        yield schema.get("description", "")
        if any("default" in field for field in schema["properties"].values()):  # of a request
            yield _parameters(schema)
            continue
        required = schema.get("required", ())
        yield table(
            ("field", "type", "meaning"),
            (
                (
                    f"`{field}`" if field in required else f"`{field}`, may be absent",
                    words(each),
                    each.get("description", ""),
                )
                for field, each in schema["properties"].items()
            ),
        )
