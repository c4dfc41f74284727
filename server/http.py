"""JSON in and out."""

import re
from typing import Any

import orjson
from quart import Response, request

from server.errors import ApiError, bad_request
from server.text import TextWork

_JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)
STRICT_HEADER = "X-Inferneo-Strict"


def json_response(
    payload: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """``payload`` as JSON; NumPy arrays in it are lists of numbers."""
    return Response(
        orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY),
        status,
        headers,
        content_type="application/json",
    )


def is_strict(value: str | None) -> bool:
    """Whether the header asks that parameters which are not known be refused."""
    return (value or "").strip().lower() in ("true", "1")


def parse_object(raw: bytes | str) -> dict[str, Any]:
    """A JSON object; of equal names the last one counts.

    Raises:
        ApiError: it is not JSON (NaN and Infinity are not), or another kind of value.
    """
    if not raw:
        raise bad_request("The request has no body; send a JSON object.")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise bad_request("The request body is JSON, but not an object; send {...}.")
    return value


async def read_object(text: TextWork) -> dict[str, Any]:
    """The request's body.

    Raises:
        ApiError: it has another content type, or is no JSON object.
    """
    # A missing content type is refused too: a browser may send such a request from any page.
    if not _JSON_TYPE.fullmatch(request.mimetype or ""):
        raise ApiError(
            415,
            "The request body must be JSON; send the header Content-Type: application/json.",
            code="unsupported_media_type",
        )
    raw = await request.get_data(cache=False, as_text=False)
    return await text.run(len(raw), lambda: parse_object(raw))


def wants_strict() -> bool:
    """Whether the current request does."""
    return is_strict(request.headers.get(STRICT_HEADER))
