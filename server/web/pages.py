"""The web pages ``GET /`` and ``GET /dashboard``, and the files that they load.

Pages are the same for every user and hold no data, so they need no key: the browser gets the data
from the API, with the key that its user entered. There is no build step: the files in
``server/web/static`` are served unchanged, and nothing is loaded from other hosts.
"""

import functools
import hashlib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, NamedTuple

from quart import Response, request
from werkzeug.exceptions import NotFound

from server.api.endpoint import Endpoint, Parameter, ResponseSpec
from server.run.context import Context
from server.services import Services

_KINDS = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # icons within Swagger UI's style sheet
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The headers of every page and file; they allow a browser to load from this server only."""


class _File(NamedTuple):
    content: bytes
    kind: str
    etag: str


@functools.cache
def _files() -> dict[str, _File]:
    found = {}
    for file in files("server.web").joinpath("static").iterdir():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None:
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()[:16]
            found[file.name] = _File(content, kind, etag)
    return found


PAGE = {
    200: ResponseSpec(
        description="A page; everything that it loads comes from this server.",
        content={"text/html": {"type": "string"}},
        headers=("Content-Security-Policy",),
    )
}
"""The description of a page's response."""


def file_parameter(names: Iterable[str]) -> dict[str, Parameter]:
    """Return the path parameter ``file``, whose value is one of ``names``."""
    schema = {"type": "string", "enum": sorted(names)}
    return {"file": Parameter(schema=schema, description="The file's name.")}


def file_response(*types: str) -> dict[int, ResponseSpec]:
    """Describe the response of a path that serves files of these media types."""
    content: dict[str, Any] = {each: {} for each in sorted(set(types))}
    return {200: ResponseSpec(description="The file.", content=content)}


def _page_files() -> dict[str, str]:
    """Return the files that the pages load, with their media types."""
    return {
        name: file.kind.partition(";")[0]
        for name, file in _files().items()
        if not name.endswith(".html")
    }


@Endpoint(
    method="GET",
    path="/",
    access="public",
    tag="server",
    summary="Chat in a browser",
    responses=PAGE,
)
async def chat_page(services: Services, context: Context) -> Response:
    """Send the page."""
    return await serve_file("chat.html")


@Endpoint(
    method="GET",
    path="/dashboard",
    access="public",
    tag="server",
    summary="Watch the server in a browser",
    responses=PAGE,
)
async def dashboard_page(services: Services, context: Context) -> Response:
    """Send the page."""
    return await serve_file("dashboard.html")


@Endpoint(
    method="GET",
    path="/pages/<file>",
    access="public",
    tag="server",
    summary="Get a file of the pages",
    parameters=file_parameter(_page_files()),
    errors=(404,),
    responses=file_response(*_page_files().values()),
)
async def page_file(services: Services, context: Context, file: str) -> Response:
    """Send a file that a page loads."""
    if file not in _page_files():
        raise NotFound
    return await serve_file(file)


async def serve_file(name: str) -> Response:
    """Return a file, or 304 if the browser has it; it asks each time, so upgrades show at once."""
    content, kind, etag = _files()[name]
    headers = HEADERS | {"Cache-Control": "no-cache"}
    response = Response(content, headers=headers, content_type=kind)
    response.set_etag(etag)
    await response.make_conditional(request)
    return response
