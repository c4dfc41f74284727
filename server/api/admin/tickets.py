"""``POST /v1/ws-tickets``: a ticket that stands for the caller's key once."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.api.admin.usage import needed_key
from server.api.endpoint import Endpoint
from server.keys.key import TICKET_SECONDS
from server.run.context import Context
from server.services import Services


class SocketTicket(TypedDict):
    """A ticket that opens one WebSocket, as `?token=`."""

    object: Literal["ws_ticket"]
    ticket: Annotated[str, Field(description="The ticket, valid for one connection.")]
    expires_in: Annotated[int, Field(description="Seconds until it expires.")]


@Endpoint(
    method="POST",
    path="/v1/ws-tickets",
    access="any",
    tag="keys",
    summary="Get a one-use ticket for a WebSocket of a web page",
    answer=SocketTicket,
    errors=(400,),
)
async def create_ticket(services: Services, context: Context) -> SocketTicket:
    """Make a ticket for the caller's key."""
    ticket = await services.guard.new_ticket(needed_key(context))
    return {"object": "ws_ticket", "ticket": ticket, "expires_in": TICKET_SECONDS}
