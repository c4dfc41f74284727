"""JSON bodies of requests and responses."""

import re
from collections.abc import AsyncGenerator
from typing import Any, cast

import orjson
from quart import Response, request

from server.http.errors import ApiError, bad_request
from server.http.pieces import PIECE, Json

_JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)
STRICT_HEADER = "X-Inferneo-Strict"
MAX_STRUCTURE = 100_000
"""Most objects, lists and names in one body. The parser keeps the interpreter to itself while it
runs, and takes a second for four megabytes of empty lists."""
_STRUCTURE = re.compile(rb'[\[{:]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


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


def long_response(written: Json) -> Response:
    """JSON that may be long: it is sent in pieces, and never copied as a whole."""
    if written.size <= PIECE:
        return Response(bytes(written), content_type="application/json")

    async def send() -> AsyncGenerator[bytes, None]:
        for piece in written.pieces():
            yield piece

    headers = {"Content-Length": str(written.size)}
    return Response(send(), headers=headers, content_type="application/json")


def is_strict(value: str | None) -> bool:
    """Whether the header asks that parameters which are not known be refused."""
    return (value or "").strip().lower() in ("true", "1")


def parse_object(raw: bytes | str) -> dict[str, Any]:
    """A JSON object; of equal names the last one counts.

    Raises:
        ApiError: it is not JSON (NaN and Infinity are not), not an object, or too intricate.
    """
    if not raw:
        raise bad_request("The request has no body; send a JSON object.")
    if _is_intricate(raw if isinstance(raw, bytes) else raw.encode(errors="replace")):
        raise bad_request(
            f"The request body holds more than {MAX_STRUCTURE} objects, lists and names; send less."
        )
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise bad_request("The request body is JSON, but not an object; send {...}.")
    return value


def _is_intricate(raw: bytes) -> bool:
    """Whether there is too much structure in it, what strings hold not counted."""
    if sum(map(raw.count, (b"[", b"{", b":"))) <= MAX_STRUCTURE:
        return False
    found = 0
    for match in _STRUCTURE.finditer(raw):
        found += raw[match.start()] != ord('"')
        if found > MAX_STRUCTURE:
            return True
    return False


async def read_json() -> bytes:
    """The current request's body, which is said to be JSON.

    Raises:
        ApiError: the body has another content type or encoding, or came too slowly.
    """
    # A missing content type is refused too: a browser may send such a request from any page.
    if not _JSON_TYPE.fullmatch(request.mimetype or ""):
        raise ApiError(
            415,
            "The request body must be JSON; send the header Content-Type: application/json.",
            code="unsupported_media_type",
        )
    if (coding := request.headers.get("Content-Encoding", "identity")).lower() != "identity":
        raise ApiError(
            415,
            f"The content encoding {coding[:40]!r} is not supported; send the JSON as it is.",
            code="unsupported_media_type",
        )
    return cast(bytes, await request.get_data(cache=False, as_text=False))


def wants_strict() -> bool:
    """Whether the current request does."""
    return is_strict(request.headers.get(STRICT_HEADER))
