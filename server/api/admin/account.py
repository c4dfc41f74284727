"""What a key's holder may know and have: ``GET /v1/usage`` and ``POST /v1/ws-tickets``."""

from functools import partial

from quart import Blueprint, Response

from server.http.codec import json_response
from server.http.connection import current_request
from server.http.errors import bad_request
from server.keys.key import TICKET_SECONDS, Key
from server.keys.usage import key_usage
from server.services import Services


def blueprint(services: Services) -> Blueprint:
    """Both routes."""
    routes = Blueprint("keys", __name__, url_prefix="/v1")

    @routes.get("/usage")
    async def usage() -> Response:
        key = _needed()
        await services.threads.flush()
        return json_response(
            await services.threads.call(partial(key_usage, services.threads.store, key))
        )

    @routes.post("/ws-tickets")
    async def create_ticket() -> Response:
        ticket = await services.guard.new_ticket(_needed())
        answer = {"object": "ws_ticket", "ticket": ticket, "expires_in": TICKET_SECONDS}
        return json_response(answer)

    return routes


def _needed() -> Key:
    key: Key | None = current_request().caller.key
    if key is None:
        raise bad_request("This server needs no API keys now, and keeps nothing about callers.")
    return key
