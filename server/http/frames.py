"""WebSocket messages from clients, limited in bytes wherever any of them is kept.

Hypercorn (0.18) bounds a message in characters, of which one emoji makes every other take four
bytes; it goes on collecting beyond its bound, and queues ten messages more. Here a socket holds one
message at most: the next is not parsed before the application asks for it, so that what else the
client sends waits in its own socket.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.events import Body, Data, Event, StreamClosed
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.typing import ASGISendCallable
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping

from server.http.alarm import Alarm
from server.http.errors import RETRY_OVERLOADED_SECONDS, ApiError, unavailable
from server.http.transport import owner_of

FIRST_FRAME_BYTES = 4096
"""The longest frame of a client that is not identified yet; a key takes a hundred bytes."""
PING_SECONDS = 20.0
STALL_SECONDS = 20.0
STALL_BYTES = 64 * 1024
"""In each :data:`STALL_SECONDS` a frame must be complete, or this many bytes of it arrive."""
MIN_TOTAL_BYTES = 64 * 1024 * 1024
_GUARANTEED_BYTES = 64 * 1024


class FrameError(ApiError):
    """The error for a frame after which nothing more can be read from the client.

    Attributes:
        close_code: what the connection is to be closed with (RFC 6455, 7.4.1).
    """

    def __init__(self, close_code: int, message: str, *, status: int = 400, code: str) -> None:
        super().__init__(status, message, code=code)
        self.close_code = close_code


class FrameMemory:
    """Limits the bytes of unparsed frames over all sockets.

    A socket may hold at most as many bytes as remain free, but always a few, so one client's frames
    never take the memory that another's need. Keys share permits in the same way.
    """

    def __init__(self, largest: int) -> None:
        """``largest`` is the size of the largest frame, which must always fit alone."""
        self.total = max(MIN_TOTAL_BYTES, 4 * largest)
        self.used = 0

    def take(self, held: int, more: int) -> bool:
        """Whether a socket that holds ``held`` bytes gets ``more``."""
        if held + more > max(_GUARANTEED_BYTES, self.total - self.used):
            return False
        self.used += more
        return True

    def give(self, held: int) -> None:
        """Return the bytes that a socket held."""
        self.used -= held


class Inbox:
    """What one client has sent and the application has not handled: one message at most.

    A message that is too long is refused as soon as it is, and its rest is dropped as it comes.

    Attributes:
        broken: whether nothing more can be read of this client.
    """

    def __init__(self, memory: FrameMemory, narrow: Callable[[int | None], None]) -> None:
        """``narrow`` limits what the layers below read ahead; None restores the default."""
        self.broken = False
        self._closed = False
        self._limit = FIRST_FRAME_BYTES
        self._memory = memory
        self._narrow = narrow
        self._parts = BytesIO()
        self._collected = 0  # of the message that is coming in
        self._lent = 0  # of the message that the application is dealing with
        self._step: int | None = None  # how many STALL_BYTES of it have come; None: there is none
        self._dropping = False
        self._item: bytes | ApiError | None = None
        self._failure: FrameError | None = None
        self._arrived = asyncio.Event()
        self._wanted = asyncio.Event()
        self._alarm = Alarm(STALL_SECONDS, self._stalled)
        narrow(FIRST_FRAME_BYTES)

    def widen(self, limit: int) -> None:
        """Allow frames of ``limit`` bytes: the client is known."""
        self._limit = limit
        self._narrow(None)

    async def receive(self) -> bytes:
        """The next message, whose memory is free again once that after it is asked for.

        Raises:
            FrameError: the client broke the protocol; nothing else will come.
            ApiError: the message was refused; others may come.
        """
        self._memory.give(self._lent)
        self._lent = 0
        self._wanted.set()
        await self._arrived.wait()
        item = self._failure if self._item is None else self._item
        self._item = None
        if not self.broken:
            self._arrived.clear()
        if isinstance(item, bytes):
            return item
        assert item is not None
        self._failure = None
        try:
            raise item
        finally:
            del item  # its traceback refers to this frame

    async def add(self, data: str | bytes, *, last: bool) -> None:
        """Add a part of a message, once the application wants the message."""
        await self._wanted.wait()
        if self._closed or self.broken:
            return
        if not self._dropping:
            self._collect(data.encode() if isinstance(data, str) else data)
        if last:
            if not self._dropping:
                self._deliver(self._parts.getvalue(), self._collected)
            self._dropping = False
        self._watch(last=last)

    def fail(self, error: FrameError) -> None:
        """Note that nothing more can be read."""
        self._clear()
        self.broken, self._failure = True, error
        self._arrived.set()
        self._wanted.set()

    def close(self) -> None:
        """Free the memory held, and discard what still arrives."""
        self._clear()
        self._memory.give(self._lent)
        self._lent, self._item, self._closed = 0, None, True
        self._wanted.set()
        self._alarm.close()

    def _collect(self, data: bytes) -> None:
        size = self._collected + len(data)
        if size > self._limit:
            message = f"The frame is longer than {self._limit} bytes; send less."
            self._refuse(ApiError(413, message, code="frame_too_long"))
        elif not self._memory.take(self._collected, len(data)):
            message = "The server holds as many bytes of frames as it can. Send this one again."
            self._refuse(unavailable(message, "overloaded", RETRY_OVERLOADED_SECONDS))
        else:
            self._parts.write(data)
            self._collected = size

    def _refuse(self, error: ApiError) -> None:
        self._clear()
        self._dropping = True
        self._deliver(error, 0)

    def _deliver(self, item: bytes | ApiError, size: int) -> None:
        self._item, self._lent = item, size
        self._parts, self._collected = BytesIO(), 0
        self._wanted.clear()
        self._arrived.set()

    def _clear(self) -> None:
        self._memory.give(self._collected)
        self._parts, self._collected = BytesIO(), 0

    def _watch(self, *, last: bool) -> None:
        """Have the alarm ring unless the message makes progress."""
        step = None if last else self._collected // STALL_BYTES
        if step is None:
            self._alarm.clear()
        elif step != self._step:
            self._alarm.set()
        self._step = step

    def _stalled(self) -> None:
        self.fail(
            FrameError(
                1008,
                f"A frame was not whole after {STALL_SECONDS:g} s. Send it without a pause.",
                status=408,
                code="frame_stalled",
            )
        )


def take_over(send: ASGISendCallable, memory: FrameMemory) -> Inbox:
    """Collect what a WebSocket's client sends in a new inbox, and return it.

    Compression is refused: a few kilobytes can inflate to gigabytes, on the event loop.
    """
    stream = owner_of(send, WSStream)
    if stream is None:
        return Inbox(memory, lambda _: None)
    stream.handshake.extensions = None
    protocol = owner_of(stream.send, H11Protocol)  # of HTTP/2 other streams share the connection
    server = owner_of(getattr(protocol, "send", None), TCPServer)
    inbox = stream.buffer = Inbox(memory, _narrowing(server))
    return inbox


def _narrowing(server: TCPServer | None) -> Callable[[int | None], None]:
    """A function that bounds what asyncio reads ahead for a connection (384 KB as it is)."""
    if server is None or not isinstance(server.reader, asyncio.StreamReader):
        return lambda _: None
    reader: Any = server.reader
    transport: Any = server.writer.transport
    usual = reader._limit, getattr(transport, "max_size", None)

    def narrow(size: int | None) -> None:
        reader._limit = usual[0] if size is None else size
        if isinstance(usual[1], int):  # that of asyncio's own transport, without TLS
            transport.max_size = usual[1] if size is None else size

    return narrow


@asynccontextmanager
async def pinged(send: ASGISendCallable) -> AsyncIterator[None]:
    """While this is open, a WebSocket client gets a ping every 20 s.

    Hypercorn's own pings sleep on for an interval after the connection has ended, and keep it from
    being closed for so long; they are left to those who have configured them.
    """
    stream = owner_of(send, WSStream)
    if stream is None or stream.config.websocket_ping_interval is not None:
        yield
        return

    async def ping() -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            if stream.state is ASGIWebsocketState.CONNECTED:
                await stream._send_wsproto_event(Ping())

    task = asyncio.create_task(ping())
    try:
        yield
    finally:
        task.cancel()


def let_go(send: ASGISendCallable) -> None:
    """Free wsproto's parser, a generator that refers to itself, when a connection is over."""
    if (connection := getattr(owner_of(send, WSStream), "connection", None)) is not None:
        connection._proto._parse_more.close()


_handle = WSStream.handle
_handle_events = WSStream._handle_events


def patch_websockets() -> None:
    """Patch two methods of Hypercorn's, for every WebSocket.

    Data that come before the connection was accepted end it. Hypercorn answers them with 400 and
    forgets the application, which is not even told when the client leaves.
    """
    WSStream.handle = _handle_or_end  # type: ignore[method-assign]
    WSStream._handle_events = _handle_frames  # type: ignore[method-assign]


async def _handle_or_end(self: WSStream, event: Event) -> None:
    if isinstance(event, Body | Data) and not self.closed:
        if not self.handshake.accepted:
            if self.state is ASGIWebsocketState.HANDSHAKE:
                await self._send_error_response(400)
            await self.send(StreamClosed(stream_id=self.stream_id))
            return
        if isinstance(self.buffer, Inbox) and self.buffer.broken:
            return  # wsproto reads no further, but would keep what still comes
    await _handle(self, event)


async def _handle_frames(self: WSStream) -> None:
    if not isinstance(inbox := self.buffer, Inbox):
        return await _handle_events(self)
    for event in self.connection.events():
        match event:
            case Message():
                await inbox.add(event.data, last=event.message_finished)
            case Ping():
                await self._send_wsproto_event(event.response())
            case CloseConnection() if self.connection.state is ConnectionState.OPEN:
                words = f"The frame breaks the WebSocket protocol: {event.reason}."
                inbox.fail(FrameError(int(event.code), words, code="invalid_frame"))
            case CloseConnection():
                if self.connection.state is ConnectionState.REMOTE_CLOSING:
                    await self._send_wsproto_event(event.response())
                await self.send(StreamClosed(stream_id=self.stream_id))
        if self.closed:
            break
    return None
