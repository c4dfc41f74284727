"""What a key's holder may know and have: ``GET /v1/usage`` and ``POST /v1/ws-tickets``."""

import dataclasses
import secrets
from functools import partial
from typing import Any

from quart import Blueprint, Response

from server.caller import caller
from server.errors import bad_request
from server.http import json_response
from server.keys import Key
from server.services import Services
from server.usage import usage_rows

TICKET_SECONDS = 30


def blueprint(services: Services) -> Blueprint:
    """Both routes."""
    routes = Blueprint("keys", __name__, url_prefix="/v1")

    @routes.get("/usage")
    async def usage() -> Response:
        key = _needed()
        await services.threads.flush()
        rows = await services.threads.call(partial(services.threads.store.usage, key.id))
        data = usage_rows(rows)
        names = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
        answer: dict[str, Any] = {
            "object": "usage",
            "key": {"id": key.id, "name": key.name, "limits": dataclasses.asdict(key.limits)},
            "data": data,
            "total": {name: sum(row[name] for row in data) for name in names},
        }
        return json_response(answer)

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
