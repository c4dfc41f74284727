"""The web pages: ``GET /``, ``GET /dashboard``, ``GET /docs``, and the files that they load.

They are the same for everybody and hold nothing of this server, so they need no key; what they
show, a browser asks of the API with the key that its user gave. There is no build step: what lies
in ``server/web/static`` is what is served, and nothing comes from elsewhere.
"""

import functools
import hashlib
from importlib.resources import files
from typing import NamedTuple

from quart import Blueprint, Response, request
from werkzeug.exceptions import NotFound

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
"""Of every page and file: all that a browser loads comes from this server."""


class _File(NamedTuple):
    content: bytes
    kind: str
    etag: str


def page_files() -> list[str]:
    """Names of the files that the pages load."""
    return sorted(name for name in _files() if not name.endswith(".html"))


def blueprint() -> Blueprint:
    """These routes; they need neither keys nor models."""
    routes = Blueprint("pages", __name__)

    @routes.get("/")
    async def chat() -> Response:
        return await _serve("chat.html")

    @routes.get("/dashboard")
    async def dashboard() -> Response:
        return await _serve("dashboard.html")

    @routes.get("/docs")
    async def docs() -> Response:
        return await _serve("docs.html")

    @routes.get("/pages/<file>")
    async def page_file(file: str) -> Response:
        if file not in page_files():
            raise NotFound
        return await _serve(file)

    return routes


async def _serve(name: str) -> Response:
    """A file, or 304 for a browser that has it: one asks each time, so an upgrade shows at once."""
    content, kind, etag = _files()[name]
    headers = HEADERS | {"Cache-Control": "no-cache"}
    response = Response(content, headers=headers, content_type=kind)
    response.set_etag(etag)
    await response.make_conditional(request)
    return response


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
