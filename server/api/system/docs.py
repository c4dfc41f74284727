"""``GET /version``, ``GET /openapi.json``, and the files with which ``GET /docs`` shows that.

They are Swagger UI's as the package ``flask_swagger_ui`` ships them; of that package nothing but
those files is used.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import orjson
from quart import Blueprint, Response
from werkzeug.exceptions import NotFound

from inferneo_jax import __version__
from server.http.codec import json_response
from server.web.pages import HEADERS

_JAVASCRIPT = "text/javascript"

ASSETS = {
    "swagger-ui-bundle.js": _JAVASCRIPT,
    "swagger-ui.css": "text/css",
}
"""The files, and their types."""

_A_DAY = "public, max-age=86400"


def blueprint() -> Blueprint:
    """These routes; they need no models."""
    routes = Blueprint("docs", __name__)

    @routes.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @routes.get("/openapi.json")
    async def openapi() -> Response:
        return Response(_document(), content_type="application/json")

    @routes.get("/docs/<file>")
    async def docs_file(file: str) -> Response:
        if file not in ASSETS:
            raise NotFound
        kind = ASSETS[file]
        if kind.startswith("text/"):
            kind += "; charset=utf-8"
        headers = HEADERS | {"Cache-Control": _A_DAY}
        return Response(_asset(file), headers=headers, content_type=kind)

    return routes


@functools.cache
def _document() -> bytes:
    from server.api.openapi import document  # which reads this module

    return orjson.dumps(document())


@functools.cache
def _asset(file: str) -> bytes:
    package = find_spec("flask_swagger_ui")
    assert package is not None, "a dependency of this package is missing"
    assert package.submodule_search_locations is not None
    return (Path(package.submodule_search_locations[0]) / "dist" / file).read_bytes()
