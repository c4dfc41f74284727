"""HTTP/2: checks that h2 (4.4) and Hypercorn (0.18) leave out."""

import asyncio
import re
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import structlog
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RequestReceived, StreamReset
from hypercorn.events import Closed, RawData, Updated
from hypercorn.events import Event as WireEvent
from hypercorn.protocol.h2 import H2Protocol

from server.http.locality import is_host

log = structlog.get_logger(__name__)

MAX_RESETS = 100
RESET_SECONDS = 10.0
"""A client may give up so many streams of a connection within that time."""
_resets: "WeakKeyDictionary[H2Protocol, deque[float]]" = WeakKeyDictionary()
_METHOD = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_PATH = re.compile(rb"/[\x21-\x7e]*")

_PIECE_BYTES = 4096
"""What is parsed in one go; a request takes forty bytes, and no turn of the event loop too many."""

_handle = H2Protocol.handle
_initiate = H2Protocol.initiate
_handle_events = H2Protocol._handle_events


def patch() -> None:
    """Patch three of Hypercorn's methods, for every connection.

    A request with a malformed pseudo-header ends its own stream. Some of them ended the whole
    connection with an exception; others reached the application, which cannot tell either what is
    meant.

    A connection without a request is closed after ``keep_alive_timeout``, as in HTTP/1.1. One that
    began with HTTP/2's preface stayed open for as long as its client liked.

    Data of a stream that was answered already is dropped. It ended the whole connection.

    A client that opens streams only to reset them is cut (CVE-2023-44487): the bound for streams at
    once does not count those, but each starts a request. Others get a turn between two requests.
    """
    H2Protocol.handle = _handle_in_pieces  # type: ignore[method-assign]
    H2Protocol.initiate = _initiate_idle  # type: ignore[method-assign]
    H2Protocol._handle_events = _handle_sound_events  # type: ignore[method-assign]


async def _handle_in_pieces(self: H2Protocol, event: WireEvent) -> None:
    if not isinstance(event, RawData):
        return await _handle(self, event)
    for start in range(0, len(event.data), _PIECE_BYTES):
        await _handle(self, RawData(event.data[start : start + _PIECE_BYTES], event.address))
        await asyncio.sleep(0)
    return None


async def _initiate_idle(self: H2Protocol, *args: Any, **kwargs: Any) -> None:
    await _initiate(self, *args, **kwargs)
    await self.send(Updated(idle=self.idle))


async def _handle_sound_events(self: H2Protocol, events: list[Event]) -> None:
    for event in events:
        if isinstance(event, RequestReceived) and (fault := _fault(event)) is not None:
            log.info("request_malformed", reason=fault)
            self.connection.reset_stream(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            self.keep_alive_requests += 1
            if self.keep_alive_requests > self.config.keep_alive_max_requests:
                self.connection.close_connection()
        elif isinstance(event, StreamReset) and _resets_too_often(self):
            log.info("streams_reset", number=MAX_RESETS, seconds=RESET_SECONDS)
            self.connection.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            await self._flush()
            await self.send(Closed())
            return
        elif isinstance(event, DataReceived) and event.stream_id not in self.streams:
            # The window of the connection is shared, and must not shrink by it.
            self.connection.acknowledge_received_data(
                event.flow_controlled_length or 0, event.stream_id
            )
        else:
            await _handle_events(self, [event])
            if isinstance(event, RequestReceived):
                await asyncio.sleep(0)
    await self._flush()


def _resets_too_often(protocol: H2Protocol) -> bool:
    """Count another reset; whether the last so many of them came too fast."""
    times = _resets.setdefault(protocol, deque(maxlen=MAX_RESETS))
    now = asyncio.get_running_loop().time()
    times.append(now)
    return len(times) == MAX_RESETS and now - times[0] < RESET_SECONDS


def _fault(request: RequestReceived) -> str | None:
    """What is wrong with a request's head, by RFC 9113 (8.3) and RFC 8441; None: nothing."""
    headers = {bytes(name): bytes(value) for name, value in request.headers or ()}
    method, path = headers.get(b":method", b""), headers.get(b":path", b"")
    if not _METHOD.fullmatch(method):
        return ":method is no token"
    if method == b"CONNECT" and headers.get(b":protocol") != b"websocket":
        return ":method is CONNECT, and :protocol is not websocket"
    if not (_PATH.fullmatch(path) or (method, path) == (b"OPTIONS", b"*")):
        return ":path is no path, which begins with / and holds no spaces"
    if headers.get(b":scheme") not in (b"http", b"https"):
        return ":scheme is neither http nor https"
    host = headers.get(b":authority", headers.get(b"host", b""))
    if not is_host(host.decode("latin-1")):
        return ":authority is no name or address, with or without a port"
    if request.stream_ended and int(headers.get(b"content-length", b"0")) != 0:
        return "Content-Length announces a body, and there is none"
    return None
