"""Every error, in the one envelope ``{"error": {"message", "type", "param", "code"}}``."""

from typing import Annotated, Literal

import structlog
from pydantic import Field, ValidationError
from typing_extensions import TypedDict
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from inferneo_jax import (
    ContextLengthError,
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from server.config.validation import describe, field_of

log = structlog.get_logger(__name__)

RETRY_LOADING_SECONDS = 5
RETRY_OVERLOADED_SECONDS = 1


ErrorType = Literal[
    "invalid_request_error",
    "server_error",
    "permission_error",
    "authentication_error",
    "rate_limit_exceeded",
    "insufficient_quota",
]


class ErrorDetails(TypedDict):
    """What went wrong, and how to fix it."""

    message: Annotated[
        str,
        Field(
            description="What went wrong, for people: it names the field, its value and its bound."
        ),
    ]
    type: Annotated[ErrorType, Field(description="The kind of error.")]
    param: Annotated[
        str | None, Field(description="The path of the field at fault, if there is one.")
    ]
    code: Annotated[str | None, Field(description="A stable code for programs, if there is one.")]


class Error(TypedDict):
    """The body of every error."""

    error: Annotated[ErrorDetails, Field(description="The error.")]


class ApiError(Exception):
    """An error as the client sees it.

    Attributes:
        status: the HTTP status; frames and events carry the envelope alone.
        headers: what the response must carry besides, such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def name(self) -> str:
        """In one word, for logs and close frames."""
        return self.code or self.kind

    def envelope(self) -> Error:
        """The body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for a request that its client must change."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, seconds: int) -> ApiError:
    """The error for a request that may succeed if it is sent again ``seconds`` later."""
    headers = {"Retry-After": str(seconds), "Retry-After-Ms": str(seconds * 1000)}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def shutting_down() -> ApiError:
    """The error for requests that arrive while the server shuts down."""
    message = "The server is shutting down. Send the request again, to another server."
    return unavailable(message, "overloaded", RETRY_LOADING_SECONDS)


def as_api_error(error: BaseException) -> ApiError:
    """The error that a client sees for any exception; faults of the server are logged here."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            first = error.errors(include_url=False, include_context=True)[0]
            return bad_request(describe(first), field_of(first))
        case ContextLengthError():
            return bad_request(_sentence(error), error.param, "context_length_exceeded")
        case RequestError():
            return bad_request(_sentence(error), error.param)
        case OverloadedError():
            return unavailable(_sentence(error), "overloaded", RETRY_OVERLOADED_SECONDS)
        case EngineStoppedError():
            return shutting_down()
        case EngineFailedError():
            log.error("request_failed", reason=str(error))
            message = "The engine failed while it had this request. Send it again."
            return ApiError(500, message, kind="server_error", code="engine_failed")
        case EngineError():  # such as that the system starts no process
            log.error("request_failed", reason=str(error))
            message = "The server lacks what this request needs now. Send it again later."
            return unavailable(message, "overloaded", RETRY_LOADING_SECONDS)
        case HTTPException():
            return _from_http(error)
    log.error("request_failed", exc_info=error)
    return ApiError(500, "The server failed to handle this request.", kind="server_error")


def _from_http(error: HTTPException) -> ApiError:
    status = error.code or 500
    if status == 404:
        message = "There is nothing at this path. The API's paths begin with /v1."
        return ApiError(404, message, code="not_found")
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or ()))
        message = f"This path does not take the method; it takes {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    kind: ErrorType = "server_error" if status >= 500 else "invalid_request_error"
    return ApiError(status, error.description or error.name, kind=kind)


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
