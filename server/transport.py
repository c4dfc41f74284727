"""What an application cannot ask of Hypercorn (0.18), done on Hypercorn's own objects.

They are reached by way of the ``send`` that the application is given, whose owners hold them; where
these are not the ones expected, nothing is changed.
"""

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import h11
import structlog
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WebsocketBuffer, WSStream
from hypercorn.typing import ASGISendCallable, ASGISendEvent
from wsproto.events import Message, Ping

from server import http1, http2
from server.alarm import Alarm

log = structlog.get_logger(__name__)

PING_SECONDS = 20.0
SEND_BUFFER_BYTES = 128 * 1024
"""What the kernel keeps for a client that does not read; left alone it would keep megabytes."""
STALL_SECONDS = 120.0
"""How long a client may read nothing of what it was sent."""


class Patience:
    """Drops a client that has read nothing for a while: what it left unread fills its socket.

    Nothing more can be told to it, for the same reason. Its connection is cut, which ends
    everything that runs for it.
    """

    def __init__(self, send: ASGISendCallable) -> None:
        self._send = send
        self._alarm = Alarm(STALL_SECONDS, self._lose)
        stream = _owner(send, (HTTPStream, WSStream))
        protocol = _owner(getattr(stream, "send", None), (H11Protocol, H2Protocol))
        self._server = _owner(getattr(protocol, "send", None), TCPServer)
        if self._server is not None:
            raw = self._server.writer.get_extra_info("socket")
            with suppress(OSError):  # it has been closed
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    async def send(self, message: ASGISendEvent) -> None:
        """Pass a message on, which waits until the client has made room for it."""
        if self._server is None:
            return await self._send(message)
        self._alarm.set()
        try:
            await self._send(message)
        finally:
            self._alarm.clear()
        return None

    def close(self) -> None:
        """Nothing more will be sent."""
        self._alarm.close()

    def cut(self) -> None:
        """End the connection at once, whatever it still had to carry."""
        if self._server is not None:
            self._server.writer.transport.abort()

    def _lose(self) -> None:
        log.info("reader_stalled", seconds=STALL_SECONDS)
        self.cut()


class Departure:
    """Notices that a client has gone though Hypercorn has stopped reading its connection.

    Hypercorn reads no further once a second request has arrived behind the one being answered. If
    the client then closes the connection, nothing tells the application, and a long generation runs
    on for nobody. The transport still learns of it, and tells the stream reader, which is where
    this listens.

    Attributes:
        watched: Hypercorn is as expected.
    """

    def __init__(self, send: ASGISendCallable) -> None:
        self._send = send
        self._gone = False
        self._telling: asyncio.Task[None] | None = None
        self._stream = _owner(send, HTTPStream)
        self._protocol = _owner(getattr(self._stream, "send", None), H11Protocol)
        server = _owner(getattr(self._protocol, "send", None), TCPServer)
        self._reader: Any = getattr(server, "reader", None)
        self.watched = isinstance(self._reader, asyncio.StreamReader)

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """While this is open, the application is told ``http.disconnect`` when the client goes."""
        if not self.watched:
            yield
            return
        reader, kept = self._reader, (self._reader.feed_eof, self._reader.set_exception)
        reader.feed_eof = self._after(kept[0])
        reader.set_exception = self._after(kept[1])
        try:
            yield
        finally:
            reader.feed_eof, reader.set_exception = kept

    async def finish(self) -> None:
        """Once the application is done: let Hypercorn see the end, which it would wait for."""
        if self._gone and self._stream.state is ASGIHTTPState.RESPONSE:
            with suppress(Exception):  # whatever is wrong with it, nobody is there to see it
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        if self.watched and (self._reader._eof or self._reader.exception() is not None):
            # Bytes that lie behind the request hold up the connection's task: nobody recycles a
            # connection that broke while it was written to. So there are none any more.
            emptied = H11WSConnection(self._protocol.connection)
            emptied.buffer.clear()
            self._protocol.connection = emptied
            await self._protocol.can_read.set()

    def _after(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            original(*args)
            unread = self._reader._buffer or self._protocol.connection.trailing_data[0]
            if unread and not self._gone:  # else Hypercorn reads on, and sees it itself
                self._gone = True
                put: Callable[[Any], Awaitable[None]] = self._stream.app_put
                self._telling = asyncio.ensure_future(_call(put, {"type": "http.disconnect"}))

        return call


class _CutBuffer(WebsocketBuffer):
    """Collects a frame's text up to its bound, and drops the rest.

    Hypercorn's own closes the connection at its bound but goes on collecting what still comes.
    """

    def extend(self, event: Message[Any]) -> None:
        """Take a part of a message."""
        room = self.max_length - self.length
        super().extend(dataclasses.replace(event, data=event.data[:room]))


def bound_frames(send: ASGISendCallable, limit: int) -> None:
    """Let a client's frames take no more memory than ``limit``, cut behind it by one character.

    Compression is refused: a few kilobytes can inflate to gigabytes, on the event loop.
    """
    if (stream := _owner(send, WSStream)) is not None:
        stream.handshake.extensions = None
        stream.buffer = _CutBuffer(limit + 1)


_check_protocol = H11Protocol._check_protocol
_read_data = TCPServer._read_data


def mend_hypercorn() -> None:
    """Change some of its methods, for every connection.

    ``Upgrade: h2c`` is answered in HTTP/1.1, as RFC 9110 (7.8) allows. A proxy that passes the
    header on would find itself tunnelling, unseen, requests that its own rules were to judge. A
    client that knows that it talks to HTTP/2 begins in it at once.

    A connection that its client has closed is closed. Hypercorn holds it for the rest of
    ``keep_alive_timeout`` (5 s): two hundred short connections a second were a thousand open files.
    """
    H11Protocol._check_protocol = _check_without_h2c  # type: ignore[method-assign]
    TCPServer._read_data = _read_until_closed  # type: ignore[method-assign]
    http1.mend()
    http2.mend()


async def _check_without_h2c(self: H11Protocol, event: h11.Request) -> None:
    if not any(n == b"upgrade" and v.strip().lower() == b"h2c" for n, v in event.headers):
        await _check_protocol(self, event)


async def _read_until_closed(self: TCPServer) -> None:
    await _read_data(self)
    await self.idle_task.stop()
    # What an answer that is still under way would leave waiting.
    self._idle_timeout = self._initiate_server_close  # type: ignore[method-assign]


@asynccontextmanager
async def pinged(send: ASGISendCallable) -> AsyncIterator[None]:
    """While this is open, a WebSocket client gets a ping every 20 s.

    Hypercorn's own pings sleep on for an interval after the connection has ended, and keep it from
    being closed for so long; they are left to those who have configured them.
    """
    stream = _owner(send, WSStream)
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


async def _call(function: Callable[[Any], Awaitable[None]], argument: Any) -> None:
    await function(argument)


def _owner(method: Any, kind: type | tuple[type, ...]) -> Any:
    owner = getattr(method, "__self__", None)
    return owner if isinstance(owner, kind) else None
