"""WebSocket connections, from the handshake to the end."""

import asyncio
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import orjson
import structlog
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart import Quart, websocket
from quart.asgi import ASGIWebsocketConnection
from quart.wrappers.websocket import Websocket

from server.http.connection import CONNECTIONS, Connections, request_id, while_connected
from server.http.errors import ApiError
from server.http.frames import FrameError, FrameMemory, Inbox, let_go, pinged, take_over
from server.http.transport import WriteTimeout
from server.observe.access_log import AccessLogEntry

if TYPE_CHECKING:
    from server.observe.metrics import Metrics

CLOSE_SECONDS = 2.0
"""How long a client has to answer a close frame; what it sends meanwhile is discarded."""
_FRAMES = "frames"
_METRICS = "metrics"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ApiWebsocket(Websocket):
    """A WebSocket with its id, its access log entry, and what must be closed when it is over.

    Attributes:
        caller: who opened it, as the guard found (:class:`~server.keys.caller.Caller`); None until
            then.
        inbox: what its client sent.
        cut: ends the connection at once.
        accepted: whether the handshake was answered with 101.
    """

    inbox: Inbox
    cut: Callable[[], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.id = request_id(self.headers)
        self.log_entry = AccessLogEntry()
        self.cleanup = ExitStack()
        self.accepted = False
        self.caller: Any = None
        self._closed = False

    async def accept(self, *args: Any, **kwargs: Any) -> None:
        """Answer the handshake."""
        await super().accept(*args, **kwargs)
        self.accepted = True

    async def receive(self) -> bytes:
        """The client's next frame.

        Raises:
            ApiError: it was refused, or nothing more can be read.
        """
        return await self.inbox.receive()

    async def close(self, code: int, reason: str = "") -> None:
        """Send a close frame, once; the connection of a client that does not answer is closed."""
        if not self._closed:
            self._closed = True
            self.log_entry.add(close_code=code)
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.cut, context=Context())
            await super().close(code, reason)

    async def refuse(self, error: ApiError) -> None:
        """Log why the socket ends. If it is open, tell the client, and close it."""
        self.log_entry.add_error(error)
        if not self.accepted:
            self.log_entry.add(status=error.status)
            return
        await self.send(orjson.dumps(error.envelope()).decode())
        await self.close(close_code(error), error.name)

    def check_origin(self, allowed: tuple[str, ...]) -> None:
        """Let in programs, which send no origin, this machine's pages, and ``allowed`` origins.

        A page served under the very address it connects to is let in only when that is a number: a
        name can be made to point here by whoever owns it (DNS rebinding).

        Raises:
            ApiError: a page of another origin opened this socket.
        """
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        if origin is None or origin in allowed or "*" in allowed:
            return
        with suppress(ValueError):  # what is no URL is foreign
            page = urlsplit(origin)
            name = page.hostname or ""
            is_number = ":" in name or name.replace(".", "").isdigit()
            if name in _LOOPBACK or (is_number and page.netloc == host):
                return
        raise ApiError(
            403,
            f"Pages of the origin {origin[:100]!r} may not connect; add it to "
            "INFERNEO_ALLOWED_ORIGINS to allow it.",
            kind="permission_error",
            code="origin_not_allowed",
        )


def close_code(error: ApiError) -> int:
    """The code that a socket is closed with because of an error (RFC 6455, 7.4)."""
    if isinstance(error, FrameError):
        return error.close_code
    if error.status in (401, 403, 429):
        return 4000 + error.status
    known = {413: 1009, 503: 1013}  # message too big; try again later
    return known.get(error.status, 1008 if error.status < 500 else 1011)


def current_socket() -> ApiWebsocket:
    """The WebSocket that is being served."""
    return cast(ApiWebsocket, cast(Any, websocket)._get_current_object())


class WebsocketConnection(ASGIWebsocketConnection):
    """Limits what the client may send, pings it, and logs and counts how the socket ended."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one connection."""
        connections: Connections = self.app.extensions[CONNECTIONS]
        write_timeout = WriteTimeout(send)
        socket = cast(ApiWebsocket, self._create_websocket_from_scope(write_timeout.send))
        socket.inbox = take_over(send, self.app.extensions[_FRAMES])
        socket.cut = write_timeout.cut
        structlog.contextvars.bind_contextvars(id=socket.id)
        try:
            async with pinged(send):
                with connections.opened(write_timeout):
                    await while_connected(
                        self._handle(socket, write_timeout), _listen(receive, socket.inbox)
                    )
        finally:
            socket.inbox.close()
            let_go(send)
            socket.cleanup.close()
            self._tell(socket)
            vars(socket).clear()  # as HttpConnection does with a request

    async def _handle(self, socket: ApiWebsocket, write_timeout: WriteTimeout) -> None:
        """Run the handler, then give the client time to read how it ended."""
        try:
            await self.handle_websocket(socket, write_timeout.send)
        except asyncio.CancelledError as error:
            # Task groups keep the error that ends them, whose traceback leads to all that was
            # under way here: garbage that only the collector would find.
            traceback.clear_frames(error.__traceback__)
            raise
        if socket.accepted:
            socket.inbox.close()
            await asyncio.sleep(CLOSE_SECONDS)

    def _tell(self, socket: ApiWebsocket) -> None:
        rule = socket.url_rule.rule if socket.url_rule else "none"
        entry, metrics = socket.log_entry, cast("Metrics", self.app.extensions[_METRICS])
        code = entry.fields.get("status") or entry.fields.get("close_code")
        entry.fields = {"route": rule} | entry.fields
        metrics.socket_ended(rule, "client" if code is None else str(code))
        entry.write("websocket")


async def _listen(receive: ASGIReceiveCallable, inbox: Inbox) -> None:
    """Return once the client has disconnected."""
    while (event := await receive())["type"] != "websocket.disconnect":
        if event["type"] == "websocket.receive":  # of a server that is not Hypercorn
            await inbox.add(event.get("bytes") or event.get("text") or b"", last=True)


def install_sockets(app: Quart, metrics: "Metrics", max_frame_bytes: int) -> None:
    """Make ``app`` use these classes, after ``connection.install``."""
    app.extensions[_FRAMES] = FrameMemory(max_frame_bytes)
    app.extensions[_METRICS] = metrics
    app.websocket_class = ApiWebsocket
    app.asgi_websocket_class = WebsocketConnection
