"""``GET /version``, ``GET /openapi.json``, and ``GET /docs``: the same for a browser.

The page is Swagger UI as the package ``flask_swagger_ui`` ships it; of that package nothing but
those files is used. All of the page comes from this server, and its policy allows nothing else.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import orjson
from quart import Blueprint, Response
from werkzeug.exceptions import NotFound

from inferneo_jax import __version__
from server.http import json_response

_JAVASCRIPT = "text/javascript"

ASSETS = {
    "favicon-32x32.png": "image/png",
    "start.js": _JAVASCRIPT,
    "swagger-ui-bundle.js": _JAVASCRIPT,
    "swagger-ui.css": "text/css",
}
"""The page's files, and their types."""

_PAGE = b"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Inferneo-JAX</title>
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<noscript>This page needs JavaScript; <a href="openapi.json">openapi.json</a> does not.</noscript>
<div id="page"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = b"""\
SwaggerUIBundle({
  url: "openapi.json", dom_id: "#page",
  deepLinking: true, tryItOutEnabled: true, validatorUrl: null,
});
"""
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # icons within the style sheet
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
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

    @routes.get("/docs")
    async def docs() -> Response:
        return Response(_PAGE, headers=_HEADERS, content_type="text/html; charset=utf-8")

    @routes.get("/docs/<file>")
    async def docs_file(file: str) -> Response:
        if file not in ASSETS:
            raise NotFound
        kind = ASSETS[file]
        if kind.startswith("text/"):
            kind += "; charset=utf-8"
        headers = _HEADERS | {"Cache-Control": _A_DAY}
        return Response(_asset(file), headers=headers, content_type=kind)

    return routes


@functools.cache
def _document() -> bytes:
    from server.openapi import document  # which reads this module

    return orjson.dumps(document())


@functools.cache
def _asset(file: str) -> bytes:
    if file == "start.js":
        return _START
    package = find_spec("flask_swagger_ui")
    assert package is not None, "a dependency of this package is missing"
    assert package.submodule_search_locations is not None
    return (Path(package.submodule_search_locations[0]) / "dist" / file).read_bytes()
