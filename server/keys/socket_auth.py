"""Authentication of WebSockets, whose clients cannot always send headers."""

import asyncio
from contextlib import suppress

from quart import websocket

from server.config.settings import Settings
from server.http.codec import parse_object
from server.http.errors import ApiError
from server.http.socket_connection import current_socket
from server.keys.caller import Caller
from server.keys.guard import Guard, bearer, unauthenticated
from server.keys.key import Key
from server.keys.limits import Limiter, exhausted
from server.keys.sockets import SocketAdmission
from server.models.registry import Registry, still_loading

FIRST_FRAME_SECONDS = 10.0
PROTOCOL = "inferneo.key."


async def admit_socket(
    settings: Settings,
    guard: Guard,
    limiter: Limiter,
    sockets: SocketAdmission,
    registry: Registry,
) -> None:
    """Authenticate a WebSocket before its handler runs.

    A key is taken from the Authorization header, from the subprotocol ``inferneo.key.<key>``, or
    for a one-use ticket ``?token=``. A client that sends none of them is accepted, and must send
    ``{"type": "auth", "api_key": ...}`` as its first frame.

    Raises:
        ApiError: it has no key that may do this, or there are too many; a connection that was
            accepted meanwhile is to be closed.
    """
    socket = current_socket()
    socket.caller = Caller()
    waiting = None
    if await guard.serves_without_key(websocket):
        key = None
    elif (text := bearer(websocket) or _offered()) is not None:
        key = await guard.identify(text)
    elif (ticket := websocket.args.get("token")) is not None:
        key = await guard.ticket_holder(ticket)
    else:
        if websocket.url_rule is None:  # no socket is to be had here, with or without a key
            raise unauthenticated("This server needs an API key.")
        if not registry.loaded:
            raise still_loading()
        client = websocket.scope.get("client")
        waiting = sockets.wait(client[0] if client else None)
        socket.cleanup.callback(waiting.release)
        await open_socket(settings, limiter)
        key = await guard.identify(await _first_frame())
    if key is not None:
        await _enter(guard, limiter, key)
    permit = sockets.enter(None if key is None else key.id)
    socket.cleanup.callback(permit.release)
    if waiting is not None:
        waiting.release()
    socket.inbox.widen(settings.max_body_bytes)


async def open_socket(settings: Settings, limiter: Limiter) -> None:
    """Accept the connection, unless it is accepted already.

    Raises:
        ApiError: a page of a foreign origin opened it.
    """
    socket = current_socket()
    if socket.accepted:
        return
    socket.check_origin(settings.allowed_origins)
    # A browser wants one of the protocols it offered: the key's own only if there is no other.
    offered = sorted(socket.requested_subprotocols, key=lambda name: "key." in name)
    await socket.accept(
        headers={"X-Request-Id": socket.id} | await limiter.headers(socket.caller),
        subprotocol=offered[0] if offered else None,
    )


async def _enter(guard: Guard, limiter: Limiter, key: Key) -> None:
    socket = current_socket()
    socket.caller.key = key
    socket.log_entry.add(key=key.id)
    guard.check_access(key, websocket)
    found = await limiter.quota_status(key)
    socket.caller.quota_status = found
    if (refusal := exhausted(key, found)) is not None:
        raise refusal


def _offered() -> str | None:
    for protocol in websocket.requested_subprotocols:
        if protocol.startswith(PROTOCOL):
            return protocol.removeprefix(PROTOCOL)
    return None


async def _first_frame() -> str:
    """The key in the first frame.

    Raises:
        ApiError: it does not come, is too long, or is another one.
    """
    how = 'Send {"type": "auth", "api_key": "<key>"} as the first frame.'
    try:
        async with asyncio.timeout(FIRST_FRAME_SECONDS):
            frame = await current_socket().receive()
    except TimeoutError:
        raise unauthenticated(f"No API key came. {how}") from None
    message = {}
    with suppress(ApiError):  # not even JSON
        message = parse_object(frame)
    key = message.get("api_key")
    if message.get("type") != "auth" or not isinstance(key, str):
        raise unauthenticated(f"This server needs an API key. {how}")
    return key
