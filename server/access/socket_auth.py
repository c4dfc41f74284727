"""Keys of WebSocket connections, which cannot always send headers."""

import asyncio

from quart import Response, websocket

from server.access.auth import Guard, bearer, check_scope, unauthenticated
from server.access.caller import set_caller, set_standing
from server.access.keys import Key
from server.access.limits import Limiter, exhausted
from server.connection import num_sockets
from server.errors import RETRY_OVERLOADED_SECONDS, ApiError, unavailable
from server.http import parse_object
from server.models import still_loading
from server.services import Services
from server.websocket import close_failed, open_socket

FIRST_FRAME_SECONDS = 10.0
_LONGEST_FIRST_FRAME = 4096
PROTOCOL = "inferneo.key."


async def admit_socket(services: Services) -> Response | None:
    """Before every WebSocket connection; a response: it was closed, and must not go on.

    A key is taken from the Authorization header, from the subprotocol ``inferneo.key.<key>``, or
    for a one-use ticket ``?token=``. A client that sends none of them is accepted, and must send
    ``{"type": "auth", "api_key": ...}`` as its first frame.

    Raises:
        ApiError: it has no key that may do this, or there are too many; it was not accepted.
    """
    # Each may have a frame of the largest size waiting, whoever has opened it.
    if num_sockets() > services.settings.places():
        message = "The server has as many WebSockets as it can take. Try again later."
        raise unavailable(message, "overloaded", RETRY_OVERLOADED_SECONDS)
    guard, limiter = services.guard, services.limiter
    if await guard.serves_without_key(websocket):
        return None
    if (text := bearer(websocket) or _offered()) is not None:
        await _enter(guard, limiter, await guard.identify(text))
    elif (ticket := websocket.args.get("token")) is not None:
        await _enter(guard, limiter, await guard.ticket_holder(ticket))
    else:
        if websocket.url_rule is None:  # no socket is to be had here, with or without a key
            raise unauthenticated("This server needs an API key.")
        if not services.registry.loaded:
            raise still_loading()
        await open_socket(services)
        try:
            await _enter(guard, limiter, await guard.identify(await _first_frame()))
        except ApiError as error:
            await close_failed(error)
            return Response("")
    return None


async def _enter(guard: Guard, limiter: Limiter, key: Key) -> None:
    set_caller(key)
    if websocket.url_rule is not None:
        check_scope(key, websocket.url_rule.rule)
    found = await limiter.standing(key)
    set_standing(found)
    if (refusal := exhausted(key, found)) is not None:
        raise refusal


def _offered() -> str | None:
    for protocol in websocket.requested_subprotocols:
        if protocol.startswith(PROTOCOL):
            return protocol.removeprefix(PROTOCOL)
    return None


async def _first_frame() -> str:
    """The key in it.

    Raises:
        ApiError: it does not come, or is another one.
    """
    how = 'Send {"type": "auth", "api_key": "<key>"} as the first frame.'
    try:
        async with asyncio.timeout(FIRST_FRAME_SECONDS):
            frame = await websocket.receive()
    except TimeoutError:
        raise unauthenticated(f"No API key came. {how}") from None
    message = {}
    if frame and len(frame) <= _LONGEST_FIRST_FRAME:
        message = parse_object(frame)
    key = message.get("api_key")
    if message.get("type") != "auth" or not isinstance(key, str):
        raise unauthenticated(f"This server needs an API key. {how}")
    return key
