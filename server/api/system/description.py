"""``GET /openapi.json``: the OpenAPI description of the server."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config
from quart import Response
from typing_extensions import TypedDict

from server.api.endpoint import Endpoint
from server.run.context import Context
from server.services import Services


@with_config(ConfigDict(extra="allow"))
class Document(TypedDict):
    """The OpenAPI description of this server."""

    openapi: Literal["3.1.0"]
    info: Annotated[
        dict[str, Any], Field(description="The name, version and description of the API.")
    ]
    paths: Annotated[dict[str, Any], Field(description="The endpoints, by path.")]
    components: Annotated[
        dict[str, Any],
        Field(description="The schemas, headers and parameters that endpoints share."),
    ]


@Endpoint(
    method="GET",
    path="/openapi.json",
    access="any",
    tag="server",
    summary="Get this description",
    answer=Document,
)
async def openapi(services: Services, context: Context) -> Response:
    """Send the document, which is the same for every caller."""
    return Response(services.description(), content_type="application/json")
