"""The OpenAPI 3.1 document, built from the endpoints' declarations.

See https://spec.openapis.org/oas/v3.1.0.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import TypedDictSchema

from inferneo_jax import __version__
from server.api.endpoint import AnyEndpoint, Parameter, ResponseSpec, Schema
from server.http.codec import STRICT_HEADER
from server.http.deadline import TIMEOUT_HEADER
from server.http.errors import Error

_REFERENCE = "#/components/schemas/{model}"

_ABOUT = """
The server implements OpenAI's API, and a few endpoints of vLLM's.

**Requests** are JSON objects. A parameter that is `null` counts as not sent. Unknown parameters are
listed in the answer's `warnings`; with the header `X-Inferneo-Strict: true` they are errors. Every
response carries `X-Request-Id`. Every error has the body `Error`. A method that a path does not
support gets status 405 and the header `Allow`.

**Keys.** Once the server has API keys, every path but `/health`, `/ready` and the web pages needs
one: `Authorization: Bearer <key>`.

**WebSocket.** `/v1/completions` and `/v1/chat/completions` accept WebSocket connections too. Send a
request body as a text frame. With `"stream": true`, the answer's frames are the chunks that events
would hold, then `{"object": "done", "id": "..."}`; otherwise one frame holds the whole answer. To
run several requests on one connection, name each:
`{"type": "request", "id": "a", "body": {...}}`. The frames of its answer carry
`"request_id": "a"`, and `{"type": "cancel", "id": "a"}` ends it. An error is a frame
`{"error": {...}}`; the connection stays open.
"""

_TAGS = {
    "generation": "Generated text.",
    "embeddings": "Embedding vectors of texts.",
    "models": "The models served.",
    "tokens": "Tokenizers, at vLLM's paths.",
    "keys": "The caller's own API key.",
    "admin": "All keys; needs a key with the scope `admin`.",
    "server": "The server itself.",
}


_REQUEST_HEADERS = {
    "RequestId": (
        "X-Request-Id",
        Parameter(schema={"type": "string"}, description="Your id for the request."),
    ),
    "Timeout": (
        TIMEOUT_HEADER,
        Parameter(
            schema={
                "type": "string",
                "pattern": r"^\d{1,9}(\.\d{1,9})?$",
                "examples": ["30"],
            },
            description="The maximum time that the request may take, in seconds, above 0; the "
            "server's own limit may be lower.",
        ),
    ),
    "Strict": (
        STRICT_HEADER,
        Parameter(
            schema={"type": "string", "examples": ["true"]},
            description="`true` rejects unknown parameters instead of warning about them.",
        ),
    ),
}

_HEADERS: dict[str, tuple[Schema, str]] = {
    "X-Request-Id": (
        {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
        "The id that the request sent if it is valid, otherwise a new one; the log names it.",
    ),
    "Retry-After": ({"type": "string", "pattern": "^[0-9]+$"}, "When to try again, in seconds."),
    "Retry-After-Ms": (
        {"type": "string", "pattern": "^[0-9]+$"},
        "When to try again, in milliseconds.",
    ),
    "X-Should-Retry": ({"enum": ["true", "false"]}, "Whether trying again can help."),
    "WWW-Authenticate": ({"const": "Bearer"}, "The authentication scheme."),
    "Cache-Control": ({"const": "no-store"}, "The response must not be stored."),
    "Content-Security-Policy": (
        {"type": "string"},
        "The files that the page may load: only those of this server.",
    ),
}


def _error(description: str, *headers: str) -> ResponseSpec:
    return ResponseSpec(
        description=description, content={"application/json": Error}, headers=headers
    )


_ERRORS = {
    400: _error("A parameter is missing or invalid, or the body is not a JSON object."),
    401: _error("The server needs an API key, and no valid one was sent.", "WWW-Authenticate"),
    403: _error("The key lacks a scope or a model, or no keys exist and the request is not local."),
    404: _error(
        "There is no such model (`model_not_found`), key (`key_not_found`) or path (`not_found`)."
    ),
    409: _error("The key is revoked, or the last with the scope `admin` (`key_conflict`)."),
    408: _error("The body did not arrive in time."),
    413: _error("The body is too large."),
    415: _error("The content type is not JSON."),
    429: _error(
        "A limit of the key was exceeded (`rate_limit_exceeded`), or its daily quota "
        "(`insufficient_quota`).",
        "Retry-After",
        "Retry-After-Ms",
        "X-Should-Retry",
    ),
    500: _error("An error of the server; its log has the details under the request's id."),
    503: _error(
        "The models are still loading (`model_loading`), or the server or its key store is "
        "overloaded (`overloaded`).",
        "Retry-After",
        "Retry-After-Ms",
    ),
    504: _error("The request did not finish before its deadline.", "X-Should-Retry"),
}
"""The default description of each error status."""


class _Schemas(GenerateJsonSchema):
    """Pydantic's schemas without titles, which would only repeat the names.

    Answers have only the keys of their TypedDict.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def typed_dict_schema(self, schema: TypedDictSchema) -> JsonSchemaValue:
        return {"additionalProperties": False} | super().typed_dict_schema(schema)


def document(endpoints: Iterable[AnyEndpoint]) -> dict[str, Any]:
    """Return the document that describes ``endpoints``."""
    endpoints = tuple(endpoints)
    types: dict[type, TypeAdapter[Any]] = {
        kind: TypeAdapter(kind) for each in endpoints for kind in _types(each)
    }
    _, definitions = TypeAdapter.json_schemas(
        [(kind, "validation", adapter) for kind, adapter in types.items()],
        ref_template=_REFERENCE,
        schema_generator=_Schemas,
    )
    schemas = {name: _untitled(schema) for name, schema in sorted(definitions["$defs"].items())}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = paths.setdefault(endpoint.openapi_path, {})
        path[endpoint.method.lower()] = _operation(endpoint)
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
            "headers": {name: _header(name) for name in _HEADERS},
            "parameters": {
                name: _parameter(header, "header", each)
                for name, (header, each) in _REQUEST_HEADERS.items()
            },
        },
    }


def _types(endpoint: AnyEndpoint) -> Iterator[type]:
    """Yield every type that the description of an endpoint refers to."""
    yield from endpoint.body
    for response in _responses(endpoint).values():
        for kind in (*response.content.values(), response.events):
            if isinstance(kind, type):
                yield kind


def _untitled(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a component without its title, and with its description on one line."""
    rest = {key: value for key, value in schema.items() if key != "title"}
    if "description" in rest:
        rest["description"] = " ".join(rest["description"].replace("``", "`").split())
    return rest


def _reference(kind: type) -> Schema:
    return {"$ref": _REFERENCE.format(model=kind.__name__)}


def _operation(endpoint: AnyEndpoint) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        *(
            _parameter(name, "path", each, required=True)
            for name, each in endpoint.parameters.items()
        ),
        *(_parameter(name, "query", each) for name, each in endpoint.query.items()),
        {"$ref": "#/components/parameters/RequestId"},
    ]
    described: dict[str, Any] = {
        "operationId": _camel_case(endpoint.name),
        "tags": [endpoint.tag],
        "summary": endpoint.summary,
    }
    if endpoint.description:
        described["description"] = endpoint.description
    if endpoint.body:
        if endpoint.admitted:
            names = ("Strict", "Timeout")
            parameters += [{"$ref": f"#/components/parameters/{name}"} for name in names]
        references = [_reference(model) for model in endpoint.body]
        media: dict[str, Any] = {
            "schema": references[0] if len(references) == 1 else {"anyOf": references}
        }
        if endpoint.example:
            media["example"] = endpoint.example
        described["requestBody"] = {"required": True, "content": {"application/json": media}}
    responses = {
        str(status): _response(each) for status, each in sorted(_responses(endpoint).items())
    }
    return described | {"parameters": parameters, "responses": responses}


def _responses(endpoint: AnyEndpoint) -> dict[int, ResponseSpec]:
    """Return the responses by status: success, and the errors that the declaration implies."""
    found = {}
    if endpoint.answer is not None:
        words = (endpoint.answer.__doc__ or "").split("\n")[0].replace("``", "`")
        content, headers = {"application/json": endpoint.answer}, tuple(endpoint.headers)
        found[endpoint.status] = ResponseSpec(description=words, content=content, headers=headers)
    statuses = {500, *endpoint.errors}
    if endpoint.access != "public":
        statuses |= {401, 403, 503}
    if endpoint.body:
        statuses |= {400, 408, 413, 415}
    if endpoint.admitted:
        statuses |= {404, 429, 504}
    return found | {status: _ERRORS[status] for status in statuses} | dict(endpoint.responses)


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _response(response: ResponseSpec) -> dict[str, Any]:
    content: dict[str, Any] = {
        media: {"schema": _reference(kind) if isinstance(kind, type) else kind}
        for media, kind in response.content.items()
    }
    if response.events:
        content["text/event-stream"] = {"schema": _event(response.events)}
    names = ("X-Request-Id", *response.headers)
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": response.description, "headers": headers, "content": content}


def _event(kind: type) -> dict[str, Any]:
    """Return the schema of one event, as OpenAPI describes streams before version 3.2."""
    payload = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(kind), _reference(Error)]},
    }
    return {
        "type": "object",
        "properties": {"data": {"if": {"const": "[DONE]"}, "then": True, "else": payload}},
        "required": ["data"],
    }


def _header(name: str) -> dict[str, Any]:
    schema, text = _HEADERS[name]
    return {"description": text, "required": True, "schema": schema}


def _parameter(
    name: str, place: str, parameter: Parameter, *, required: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": parameter.description,
        "schema": parameter.schema,
    }
