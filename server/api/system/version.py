"""``GET /version``: the server's version."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from inferneo_jax import __version__
from server.api.endpoint import Endpoint
from server.run.context import Context
from server.services import Services


class Version(TypedDict):
    """The server's version."""

    version: Annotated[str, Field(description="The version, such as 0.1.0.")]


@Endpoint(
    method="GET",
    path="/version",
    access="any",
    tag="server",
    summary="Get the server's version",
    answer=Version,
)
async def version(services: Services, context: Context) -> Version:
    """Return the version."""
    return {"version": __version__}
