"""What an operation is, and the parts that many share."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from server.api.states import Error

Media = dict[str, Any]
"""Media types of a response, each with its schema: a model, or a JSON schema."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response of one status.

    Attributes:
        description: when it comes.
        content: what it holds.
        headers: names of headers that it carries besides ``X-Request-Id``, from ``HEADERS``.
        events: the model of a stream's events.
    """

    description: str
    content: Media
    headers: tuple[str, ...] = ()
    events: type[BaseModel] | None = None


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method of a path.

    Attributes:
        path: with ``{name}`` for what varies.
        method: in lower case.
        name: the operation's id, unique.
        tag: the group that it is shown in.
        summary: a few words.
        description: the rest, in Markdown.
        answers: by status.
        body: the models of the request's body, any of which it may be.
        parameters: in the path, by name: schema and description.
        query: the same of the query; all may be left out.
        example: a request body.
        options: headers that a request with a body may carry, from the document's parameters.
    """

    path: str
    method: str = "get"
    name: str
    tag: str
    summary: str
    description: str = ""
    answers: dict[int, Answer]
    body: tuple[type[BaseModel], ...] = ()
    parameters: dict[str, tuple[dict[str, Any], str]] | None = None
    query: dict[str, tuple[dict[str, Any], str]] | None = None
    example: dict[str, Any] | None = None
    options: tuple[str, ...] = ("Strict", "Timeout")


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "X-Request-Id": (
        {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
        "The request's own id if it had a usable one, else a new one; the server's log names it.",
    ),
    "Retry-After": ({"type": "string", "pattern": "^[0-9]+$"}, "In seconds."),
    "Retry-After-Ms": ({"type": "string", "pattern": "^[0-9]+$"}, "In milliseconds."),
    "X-Should-Retry": ({"enum": ["true", "false"]}, "Whether to send it again at all."),
    "WWW-Authenticate": ({"const": "Bearer"}, "How to send a key."),
    "Cache-Control": ({"const": "no-store"}, "It is not to be kept."),
    "Content-Security-Policy": ({"type": "string"}, "What the page may load: nothing from afar."),
}


def json(model: type[BaseModel]) -> Media:
    """One JSON object."""
    return {"application/json": model}


def ok(model: type[BaseModel], status: int = 200, *headers: str) -> dict[int, Answer]:
    """The answer to a request that succeeds."""
    return {status: Answer(description=_words(model), content=json(model), headers=headers)}


def errors(*statuses: int) -> dict[int, Answer]:
    """The usual answers of these statuses; 500 is always among them."""
    return {status: _ERRORS[status] for status in (*statuses, 500)}


def _words(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").split("\n")[0].replace("``", "`")


def _error(description: str, *headers: str) -> Answer:
    return Answer(description=description, content=json(Error), headers=headers)


_ERRORS = {
    400: _error("A parameter is missing or wrong, or the body is no JSON object."),
    401: _error("The server needs an API key, and none that counts was sent.", "WWW-Authenticate"),
    403: _error("The key may not do this, or there are no keys and the request is not local."),
    404: _error("There is no such model (`model_not_found`), or path (`not_found`)."),
    409: _error("The key is revoked, or the last that may manage keys (`key_conflict`)."),
    408: _error("The body did not arrive in time."),
    413: _error("The body is too large."),
    415: _error("The body is not declared to be JSON."),
    429: _error(
        "A limit of the key (`rate_limit_exceeded`), or of its day (`insufficient_quota`).",
        "Retry-After",
        "Retry-After-Ms",
        "X-Should-Retry",
    ),
    500: _error("The fault is the server's; its log has the details under the request's id."),
    503: _error(
        "The models are still being loaded (`model_loading`), or too many requests wait "
        "(`overloaded`).",
        "Retry-After",
        "Retry-After-Ms",
    ),
    504: _error("It was not done in the time that it was allowed.", "X-Should-Retry"),
}
BODY_ERRORS = errors(400, 401, 403, 404, 408, 413, 415, 429, 503, 504)
