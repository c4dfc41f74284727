"""``GET /docs``: the OpenAPI description, shown by Swagger UI.

Its files are served unchanged from the package ``flask_swagger_ui``; nothing else of that package
is used.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

from quart import Response
from werkzeug.exceptions import NotFound

from server.api.endpoint import Endpoint
from server.run.context import Context
from server.services import Services
from server.web.pages import HEADERS, PAGE, file_parameter, file_response, serve_file

_JAVASCRIPT = "text/javascript"
_ASSETS = {
    "swagger-ui-bundle.js": _JAVASCRIPT,
    "swagger-ui.css": "text/css",
}
"""The files of Swagger UI, and their media types."""

_A_DAY = "public, max-age=86400"


@Endpoint(
    method="GET",
    path="/docs",
    access="public",
    tag="server",
    summary="Read this description in a browser",
    responses=PAGE,
)
async def docs(services: Services, context: Context) -> Response:
    """Send the page."""
    return await serve_file("docs.html")


@Endpoint(
    method="GET",
    path="/docs/<file>",
    access="public",
    tag="server",
    summary="Get a file of Swagger UI",
    parameters=file_parameter(_ASSETS),
    errors=(404,),
    responses=file_response(*_ASSETS.values()),
)
async def docs_file(services: Services, context: Context, file: str) -> Response:
    """Send a file of Swagger UI."""
    if file not in _ASSETS:
        raise NotFound
    kind = _ASSETS[file]
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    headers = HEADERS | {"Cache-Control": _A_DAY}
    return Response(_asset(file), headers=headers, content_type=kind)


@functools.cache
def _asset(file: str) -> bytes:
    package = find_spec("flask_swagger_ui")
    assert package is not None, "a dependency of this package is missing"
    assert package.submodule_search_locations is not None
    return (Path(package.submodule_search_locations[0]) / "dist" / file).read_bytes()
