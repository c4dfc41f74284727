"""What an application cannot ask of Hypercorn (0.18), done on Hypercorn's own objects.

They are reached by way of the ``send`` that the application is given, whose owners hold them; where
these are not the ones expected, nothing is changed.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WebsocketBuffer, WSStream
from hypercorn.typing import ASGISendCallable
from wsproto.events import Message, Ping

PING_SECONDS = 20.0


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
        """Once the application is done: end its response, or Hypercorn would wait for that."""
        if self._gone and self._stream.state is ASGIHTTPState.RESPONSE:
            with suppress(Exception):  # whatever is wrong with it, nobody is there to see it
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})

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


def _owner(method: Any, kind: type) -> Any:
    owner = getattr(method, "__self__", None)
    return owner if isinstance(owner, kind) else None
