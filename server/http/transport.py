"""What Hypercorn (0.18) offers no interface for, done on its own objects.

They are reached through the owners of the ``send`` function that the application is given. If these
are not of the expected types, nothing is changed.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any

import h11
import structlog
from h11._writers import ChunkedWriter
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.typing import ASGISendCallable, ASGISendEvent, HTTPResponseBodyEvent

from server.http import http1, http2
from server.http.alarm import Alarm

log = structlog.get_logger(__name__)

SEND_BUFFER_BYTES = 128 * 1024
"""The kernel's send buffer for one client, which would grow to megabytes by itself."""
STALL_SECONDS = 120.0
"""How long a client may leave what it was sent unread."""


class WriteTimeout:
    """Closes the connection of a client that has read nothing for ``STALL_SECONDS``.

    What it left unread fills its socket, so no error can be sent to it. Closing the connection
    ends everything that runs for it.
    """

    def __init__(self, send: ASGISendCallable) -> None:
        self._send = send
        self._alarm = Alarm(STALL_SECONDS, self._lose)
        self._stream = stream = owner_of(send, (HTTPStream, WSStream))
        self._protocol = owner_of(getattr(stream, "send", None), (H11Protocol, H2Protocol))
        self._server = owner_of(getattr(self._protocol, "send", None), TCPServer)
        if self._server is not None:
            raw = self._server.writer.get_extra_info("socket")
            with suppress(OSError):  # it has been closed
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message; this waits until the client has made room for it."""
        if self._server is None:
            return await self._send(message)
        if message["type"] == "http.response.body" and self._write_chunk(message):
            return None
        self._alarm.set()
        try:
            await self._send(message)
        finally:
            self._alarm.clear()
        return None

    def _write_chunk(self, message: HTTPResponseBodyEvent) -> bool:
        """Write a chunk of a response at once; False if that is for Hypercorn to do.

        Through Hypercorn and h11 a chunk takes five calls, two locks and a third of the time that
        an event of a stream takes in all. Only chunks that nothing is waiting before are written.
        """
        body, stream, server = message["body"], self._stream, self._server
        if not (
            message["more_body"]
            and body
            and type(self._protocol) is H11Protocol
            and stream.state is ASGIHTTPState.RESPONSE
            and stream.scope["method"] != "HEAD"
        ):
            return False
        connection, transport = self._protocol.connection, server.writer.transport
        if (
            connection.our_state is not h11.SEND_BODY
            or type(connection._writer) is not ChunkedWriter
            or server.send_lock.locked()
            or transport.get_write_buffer_size()
            or transport.is_closing()
        ):
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def close(self) -> None:
        """Stop watching: nothing more will be sent."""
        self._alarm.close()

    def cut(self) -> None:
        """Close the connection at once, and drop what was not sent."""
        if self._server is not None:
            self._server.writer.transport.abort()

    def _lose(self) -> None:
        log.info("reader_stalled", seconds=STALL_SECONDS)
        self.cut()


class DisconnectWatcher:
    """Notices that a client has disconnected even while Hypercorn does not read its connection.

    Hypercorn stops reading once a second request has arrived after the one being answered. If the
    client then closes the connection, the application is not told, and a long generation runs on
    for nobody. The transport still tells the stream reader, so this listens there.

    Attributes:
        watched: whether Hypercorn's objects are the expected ones.
    """

    def __init__(self, send: ASGISendCallable) -> None:
        self._send = send
        self._gone = False
        self._telling: asyncio.Task[None] | None = None
        self._stream = owner_of(send, HTTPStream)
        self._protocol = owner_of(getattr(self._stream, "send", None), H11Protocol)
        server = owner_of(getattr(self._protocol, "send", None), TCPServer)
        self._reader: Any = getattr(server, "reader", None)
        self.watched = isinstance(self._reader, asyncio.StreamReader)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, send the application ``http.disconnect`` when the client leaves."""
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
        """Let Hypercorn see the end of the connection once the application is done."""
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


_check_protocol = H11Protocol._check_protocol
_close = TCPServer._close
_initiate_server_close = TCPServer._initiate_server_close
_read_data = TCPServer._read_data
_run = TCPServer.run


def patch_hypercorn() -> None:
    """Patch some of its methods, for every connection.

    ``Upgrade: h2c`` is answered in HTTP/1.1, as RFC 9110 (7.8) allows. A proxy that passes the
    header on would find itself tunnelling, unseen, requests that its own rules were to judge. A
    client that knows that it talks to HTTP/2 begins in it at once.

    A connection that its client has closed is closed. Hypercorn holds it for the rest of
    ``keep_alive_timeout`` (5 s): two hundred short connections a second were a thousand open files.

    A connection that is being closed is cut once its client has read nothing for a while: what it
    left unread fills its socket, and Hypercorn would wait for it without end.

    The objects of a connection that is over are freed. They refer to one another, so Hypercorn
    leaves them, and what they have read, to the garbage collector, which runs rarely here.
    """
    H11Protocol._check_protocol = _check_without_h2c  # type: ignore[method-assign]
    TCPServer._close = _close_or_cut  # type: ignore[method-assign]
    TCPServer._initiate_server_close = _initiate_close_or_cut  # type: ignore[method-assign]
    TCPServer._read_data = _read_until_closed  # type: ignore[method-assign]
    TCPServer.run = _run_and_let_go  # type: ignore[method-assign]
    http1.patch()
    http2.patch()


async def _check_without_h2c(self: H11Protocol, event: h11.Request) -> None:
    if not any(n == b"upgrade" and v.strip().lower() == b"h2c" for n, v in event.headers):
        await _check_protocol(self, event)


async def _read_until_closed(self: TCPServer) -> None:
    await _read_data(self)
    await self.idle_task.stop()
    # What an answer that is still under way would leave waiting.
    self._idle_timeout = self._initiate_server_close  # type: ignore[method-assign]


async def _close_or_cut(self: TCPServer) -> None:
    _cut_if_unread(self)
    await _close(self)


async def _initiate_close_or_cut(self: TCPServer) -> None:
    _cut_if_unread(self)
    await _initiate_server_close(self)


def _cut_if_unread(server: TCPServer) -> None:
    """Cut a connection that is being closed, unless its client goes on reading."""
    if "_cutting" not in vars(server):
        _look_later(server, server.writer.transport.get_write_buffer_size())


def _look_later(server: TCPServer, unread: int) -> None:
    # Of an empty context: a timer that is cancelled keeps it until it would have been due.
    vars(server)["_cutting"] = server.loop.call_later(
        STALL_SECONDS, _look, server, unread, context=Context()
    )


def _look(server: TCPServer, unread: int) -> None:
    transport: asyncio.WriteTransport = server.writer.transport
    left = transport.get_write_buffer_size()
    if left and left == unread:
        log.info("reader_stalled", seconds=STALL_SECONDS)
        transport.abort()
    else:
        _look_later(server, left)


async def _run_and_let_go(self: TCPServer) -> None:
    try:
        await _run(self)
    finally:
        if (timer := vars(self).get("_cutting")) is not None:
            timer.cancel()
        vars(self)["_cutting"] = None  # what still closes it from now on has nothing to wait for
        for name in ("protocol", "_idle_timeout", "_task_group"):
            vars(self).pop(name, None)


async def _call(function: Callable[[Any], Awaitable[None]], argument: Any) -> None:
    await function(argument)


def owner_of(method: Any, kind: type | tuple[type, ...]) -> Any:
    """The object whose method this is, if it is of that kind, else None."""
    owner = getattr(method, "__self__", None)
    return owner if isinstance(owner, kind) else None
