"""What a key's holder may know and have: ``GET /v1/usage`` and ``POST /v1/ws-tickets``."""

import secrets

from quart import Blueprint, Response

from server.caller import caller
from server.errors import bad_request
from server.http import json_response
from server.keys import Key
from server.services import Services
from server.usage import usage_answer

TICKET_SECONDS = 30


def blueprint(services: Services) -> Blueprint:
    """Both routes."""
    routes = Blueprint("keys", __name__, url_prefix="/v1")

    @routes.get("/usage")
    async def usage() -> Response:
        return json_response(await usage_answer(services.threads, _needed()))

    @routes.post("/ws-tickets")
    async def create_ticket() -> Response:
        ticket = f"ticket-{secrets.token_hex(16)}"
        await services.guard.keep_ticket(ticket, _needed(), TICKET_SECONDS)
        answer = {"object": "ws_ticket", "ticket": ticket, "expires_in": TICKET_SECONDS}
        return json_response(answer)

    return routes


def _needed() -> Key:
    key = caller()
    if key is None:
        raise bad_request("This server needs no API keys now, and keeps nothing about callers.")
    return key
