"""The declaration of an endpoint, and the routes built from declarations.

The routes, the access check, the labels of metrics, the names of traces, the OpenAPI document and
``docs/reference`` are all derived from the declarations. A new endpoint is a declaration next to
its body and answer, and a line in :mod:`server.endpoints`.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from quart import Quart, Response, request

from server.http.codec import json_response, wants_strict
from server.http.connection import current_request
from server.http.deadline import TIMEOUT_HEADER
from server.keys.guard import Access
from server.models.registry import still_loading
from server.run.context import Context
from server.services import Services

Schema = dict[str, Any]
"""A JSON schema."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the path or the query.

    Attributes:
        schema: the JSON schema of its value.
        description: its meaning.
    """

    schema: Schema
    description: str


@dataclass(frozen=True, kw_only=True)
class ResponseSpec:
    """The description of a response with one status.

    Attributes:
        description: when the response is sent.
        content: media types, each with the type of its content, or a JSON schema.
        headers: names of headers that the response has besides ``X-Request-Id``.
        events: the type of the events, if the response may be a stream.
    """

    description: str
    content: Mapping[str, Any]
    headers: tuple[str, ...] = ()
    events: type | None = None


@dataclass(kw_only=True)
class Endpoint(Generic[Answer]):
    """An operation of the API. Calling the declaration with a function attaches the operation.

    The operation is called with the services, the request's context, and the parameters of the
    path by name. It returns the answer, or a whole response.

    Attributes:
        method: the HTTP method, in capitals.
        path: the path in Quart's syntax, with ``<name>`` for a parameter.
        access: the access that a key needs.
        tag: the group of endpoints in the OpenAPI document.
        summary: a description in a few words.
        description: further description, in Markdown.
        answer: the type of the answer, a TypedDict; its docstring describes the response.
        status: the status of the answer.
        headers: names of the headers of the answer.
        body: the models that the request's body may match.
        example: an example of a body.
        parameters: the parameters of the path.
        query: the parameters of the query, all optional.
        errors: error statuses beyond those that follow from access, body and admission.
        responses: descriptions by status that replace the default ones.
        needs_models: whether requests are rejected until the models are loaded.
        admitted: whether a request counts against its key's limits and needs a permit; this implies
            that it needs the models.
        socket: the handler of WebSocket connections to the same path.
        traced: whether requests are traced.
        logged: whether requests are recorded in the access log.
        gen_ai_operation: the operation's name in OpenTelemetry's conventions for generative AI.
    """

    method: str
    path: str
    access: Access
    tag: str
    summary: str
    description: str = ""
    answer: type[Answer] | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: tuple[type[BaseModel], ...] = ()
    example: dict[str, Any] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    query: Mapping[str, Parameter] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    responses: Mapping[int, ResponseSpec] = field(default_factory=dict)
    needs_models: bool = False
    admitted: bool = False
    socket: Callable[[Services], Awaitable[None]] | None = None
    traced: bool = True
    logged: bool = True
    gen_ai_operation: str | None = None
    operation: Callable[..., Awaitable[Any]] = field(init=False)

    def __call__(
        self, operation: Callable[..., Awaitable[Answer | Response]]
    ) -> "Endpoint[Answer]":
        """Attach the operation and return the declaration."""
        self.operation = operation
        return self

    @property
    def name(self) -> str:
        """The operation's name, unique among endpoints."""
        return self.operation.__name__

    @property
    def socket_name(self) -> str:
        """Quart's name for the WebSocket endpoint at the same path."""
        return f"{self.name}_socket"

    @property
    def openapi_path(self) -> str:
        """The path in OpenAPI's syntax, with ``{name}`` for a parameter."""
        return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", self.path)


AnyEndpoint = Endpoint[Any]


def access_of(endpoints: Iterable[AnyEndpoint]) -> dict[str, Access]:
    """Return the access that a key needs, by the name of Quart's endpoint."""
    access = {}
    for endpoint in endpoints:
        access[endpoint.name] = access[endpoint.socket_name] = endpoint.access
    return access


def add_routes(app: Quart, services: Services, endpoints: Iterable[AnyEndpoint]) -> None:
    """Add the routes of the endpoints, and those of their WebSockets."""
    for endpoint in endpoints:
        view = _view(services, endpoint)
        app.add_url_rule(endpoint.path, endpoint.name, view, methods=[endpoint.method])
        if endpoint.socket is not None:
            serve = _socket_view(services, endpoint, endpoint.socket)
            app.add_websocket(endpoint.path, endpoint.socket_name, serve)
    for rule in app.url_map.iter_rules():
        if rule.websocket:
            rule.methods = None  # otherwise Allow would name GET, which those paths do not support


def _view(services: Services, endpoint: AnyEndpoint) -> Callable[..., Awaitable[Response]]:
    async def view(**parameters: str) -> Response:
        current = current_request()
        context = Context(
            caller=current.caller,
            strict=wants_strict(),
            timeout=request.headers.get(TIMEOUT_HEADER),
            log_entry=current.log_entry,
            cleanup=current.cleanup,
        )
        try:
            _check_models(services, endpoint)
            if endpoint.admitted:
                # Before waiting for the body, which its sender may delay at will.
                context = await services.admission.enter(context)
                current.body.deadline = context.deadline
            answer = await endpoint.operation(services, context, **parameters)
        except Exception as error:  # noqa: BLE001  (whatever the error, the charge is settled)
            raise context.fail(error) from None
        if isinstance(answer, Response):
            return answer
        return json_response(answer, endpoint.status, dict(endpoint.headers))

    return view


def _socket_view(
    services: Services, endpoint: AnyEndpoint, serve: Callable[[Services], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    async def view() -> None:
        _check_models(services, endpoint)
        await serve(services)

    return view


def _check_models(services: Services, endpoint: AnyEndpoint) -> None:
    needed = endpoint.needs_models or endpoint.admitted
    if needed and not services.registry.loaded:
        raise still_loading()
