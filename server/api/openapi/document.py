"""The OpenAPI 3.1 document: https://spec.openapis.org/oas/v3.1.0."""

import functools
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from inferneo_jax import __version__
from server.api.openapi.operation import HEADERS, Answer, Operation
from server.api.openapi.operations import OPERATIONS
from server.api.states import Error
from server.http.codec import STRICT_HEADER
from server.http.deadline import TIMEOUT_HEADER

_REFERENCE = "#/components/schemas/{model}"

_ABOUT = """
The server speaks OpenAI's API, and a little of vLLM's.

**Requests** are JSON objects. `null` means that a parameter was not sent. A parameter that is not
known is named in `warnings` of the answer, or refused if the header `X-Inferneo-Strict: true` is
there. Every response carries `X-Request-Id`, and every error the body `Error`; a path that takes
another method answers 405 with `Allow`.

**Keys.** Once the server has API keys, every path but `/health`, `/ready` and the web pages needs
one: `Authorization: Bearer <key>`.

**WebSocket.** `/v1/completions` and `/v1/chat/completions` take WebSocket connections too. A text
frame with a request body starts an answer: with `"stream": true` its frames are the chunks that the
events hold, then `{"object": "done", "id": "..."}`; without, one frame holds it whole.
`{"type": "request", "id": "a", "body": {...}}` names a request: its frames carry
`"request_id": "a"`, and `{"type": "cancel", "id": "a"}` ends it. An error is a frame
`{"error": {...}}`, and the connection stays open.
"""

_TAGS = {
    "generation": "Text from a model.",
    "embeddings": "Vectors of texts.",
    "models": "Which models there are.",
    "tokens": "What the tokenizers do, at vLLM's paths.",
    "keys": "The caller's API key.",
    "admin": "All keys, for a key of the scope `admin`.",
    "server": "The server itself.",
}


class _Schemas(GenerateJsonSchema):
    """Pydantic's schemas without titles, which would only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@functools.cache
def document() -> dict[str, Any]:
    """The whole document; not to be changed."""
    models = _models(OPERATIONS)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models],
        ref_template=_REFERENCE,
        schema_generator=_Schemas,
    )
    schemas = {name: _untitled(schema) for name, schema in sorted(definitions["$defs"].items())}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Inferneo-JAX",
            "version": __version__,
            "description": _ABOUT.strip(),
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": {name: _header(name) for name in HEADERS},
            "parameters": {
                "RequestId": _parameter(
                    "X-Request-Id", "header", {"type": "string"}, "Your name for the request."
                ),
                "Timeout": _parameter(
                    TIMEOUT_HEADER,
                    "header",
                    {"type": "string", "pattern": r"^\d{1,9}(\.\d{1,9})?$", "examples": ["30"]},
                    "How many seconds the request may take, above 0; the server may allow fewer.",
                ),
                "Strict": _parameter(
                    STRICT_HEADER,
                    "header",
                    {"type": "string", "examples": ["true"]},
                    "`true` refuses parameters that are not known.",
                ),
            },
        },
    }


def _models(operations: Iterable[Operation]) -> list[type[BaseModel]]:
    """Every model that an operation names, once."""
    found: dict[type[BaseModel], None] = {}
    for operation in operations:
        found |= dict.fromkeys(operation.body)
        for answer in operation.answers.values():
            shown = [*answer.content.values(), answer.events]
            found |= {model: None for model in shown if isinstance(model, type)}
    return list(found)


def _untitled(schema: dict[str, Any]) -> dict[str, Any]:
    """A component without its title, its description in one line."""
    rest = {key: value for key, value in schema.items() if key != "title"}
    if "description" in rest:
        rest["description"] = " ".join(rest["description"].replace("``", "`").split())
    return rest


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _operation(operation: Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        _parameter(name, "path", schema, text, required=True)
        for name, (schema, text) in (operation.parameters or {}).items()
    ] + [
        _parameter(name, "query", schema, text)
        for name, (schema, text) in (operation.query or {}).items()
    ]
    parameters.append({"$ref": "#/components/parameters/RequestId"})
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
    }
    if operation.description:
        described["description"] = operation.description
    if operation.body:
        parameters += [{"$ref": f"#/components/parameters/{name}"} for name in operation.options]
        references = [_reference(model) for model in operation.body]
        media: dict[str, Any] = {
            "schema": references[0] if len(references) == 1 else {"anyOf": references}
        }
        if operation.example:
            media["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": media}}
    responses = {str(status): _response(each) for status, each in sorted(operation.answers.items())}
    return described | {"parameters": parameters, "responses": responses}


def _response(answer: Answer) -> dict[str, Any]:
    content: dict[str, Any] = {
        kind: {"schema": _reference(model) if isinstance(model, type) else model}
        for kind, model in answer.content.items()
    }
    if answer.events:
        content["text/event-stream"] = {"schema": _event(answer.events)}
    names = ("X-Request-Id", *answer.headers)
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": answer.description, "headers": headers, "content": content}


def _event(model: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream: what schemas of streams describe until OpenAPI 3.2."""
    payload = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(model), _reference(Error)]},
    }
    return {
        "type": "object",
        "properties": {"data": {"if": {"const": "[DONE]"}, "then": True, "else": payload}},
        "required": ["data"],
    }


def _header(name: str) -> dict[str, Any]:
    schema, text = HEADERS[name]
    return {"description": text, "required": True, "schema": schema}


def _parameter(
    name: str, place: str, schema: dict[str, Any], text: str, *, required: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": text,
        "schema": schema,
    }
