"""HTTP connections: limits, clean ends, and one log line per request."""

import asyncio
import re
import secrets
from collections.abc import Collection, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any, cast

import structlog
from hypercorn.typing import (
    ASGIReceiveCallable,
    ASGISendCallable,
    HTTPScope,
)
from quart import Quart, Request, request
from quart.asgi import ASGIHTTPConnection
from quart.wrappers.request import Body
from werkzeug.datastructures import Headers

from server.http.body import LimitedBody
from server.http.transport import DisconnectWatcher, WriteTimeout
from server.observe.access_log import AccessLogEntry
from server.observe.tracing import Tracing

log = structlog.get_logger(__name__)

CONNECTIONS = "connections"
_TRACING = "tracing"
_UNLOGGED = "unlogged"
_INSIST_SECONDS = 0.05
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id(headers: Headers) -> str:
    """The client's ``X-Request-Id`` if it is safe to repeat, else a new id."""
    given = headers.get("X-Request-Id", "")
    return given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


class ApiRequest(Request):
    """A request with its id, its access log entry, and what must be closed when it is over.

    Attributes:
        caller: who sent it, as the guard found (:class:`~server.keys.caller.Caller`); None until
            then.
    """

    body_class: type[Body] = LimitedBody
    body: LimitedBody

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.id = request_id(self.headers)
        self.log_entry = AccessLogEntry()
        self.cleanup = AsyncExitStack()
        self.caller: Any = None


def current_request() -> ApiRequest:
    """The request that is being handled."""
    return cast(ApiRequest, cast(Any, request)._get_current_object())


class Connections:
    """The connections that have a running request, or a WebSocket."""

    def __init__(self) -> None:
        self._open: set[WriteTimeout] = set()
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def opened(self, write_timeout: WriteTimeout) -> Iterator[None]:
        """Count a connection as open while this context is."""
        self._open.add(write_timeout)
        self._none.clear()
        try:
            yield
        finally:
            write_timeout.close()
            self._open.discard(write_timeout)
            if not self._open:
                self._none.set()

    async def ended(self, seconds: float) -> None:
        """Wait until no connection is open, at most ``seconds``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()

    def cut(self) -> int:
        """Close all connections at once, and return how many there were."""
        for write_timeout in self._open:
            write_timeout.cut()
        return len(self._open)


async def while_connected(
    handling: Coroutine[Any, Any, None], listening: Coroutine[Any, Any, None]
) -> None:
    """Run ``handling`` until it is done, or until ``listening`` ends: the client has left.

    Quart's own way to do this asks a handler to stop once. Such a request gets lost when the body
    arrives in the same turn of the loop (``asyncio.wait_for`` before Python 3.12 drops it), and is
    never made when Hypercorn ends the connection's tasks; the handler then runs on for nobody.
    """
    tasks = [asyncio.ensure_future(handling), asyncio.ensure_future(listening)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_INSIST_SECONDS)
    for task in tasks:
        if not task.cancelled():
            task.result()


class HttpConnection(ASGIHTTPConnection):
    """Closes and logs every request, however it ended.

    A generator that was started and not finished is closed here: a client may go away between the
    handler's end and the response's beginning.
    """

    def __init__(self, app: Quart, scope: HTTPScope) -> None:
        super().__init__(app, scope)
        self._request: ApiRequest | None = None

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one request."""
        watcher = DisconnectWatcher(send)
        try:
            with watcher.watching():
                write_timeout = WriteTimeout(send)
                request = self._create_request_from_scope(write_timeout.send)
                with self.app.extensions[CONNECTIONS].opened(write_timeout):
                    await while_connected(
                        self.handle_request(request, write_timeout.send),
                        self.handle_messages(request, receive),
                    )
            await watcher.finish()
        finally:
            if (current := self._request) is not None:
                await current.cleanup.aclose()
                rule = current.url_rule.rule if current.url_rule else "none"
                facts = {"method": current.method, "route": rule}
                current.log_entry.fields = facts | current.log_entry.fields
                if rule not in self.app.extensions[_UNLOGGED]:
                    current.log_entry.write("request")
                # The loop keeps a cancelled timer until it would have been due (a deadline for an
                # hour), and with it the context that it was set in, which leads here.
                vars(current).clear()

    async def handle_request(self, request: Request, send: ASGISendCallable) -> None:
        """Run the handler and send its response."""
        try:
            await super().handle_request(request, send)
        except asyncio.CancelledError:
            if self._request is not None:
                self._request.log_entry.add(disconnected=True)
            raise

    def _create_request_from_scope(self, send: ASGISendCallable) -> Request:
        request = super()._create_request_from_scope(send)
        if isinstance(request, ApiRequest):
            self._request = request
            # Everything that is logged on behalf of the request names it.
            structlog.contextvars.bind_contextvars(id=request.id)
            request.log_entry.begin_trace(
                self.app.extensions[_TRACING],
                request.method,
                request.path,
                request.headers,
                request.id,
            )
        return request


def install(app: Quart, tracing: Tracing | None, unlogged: Collection[str]) -> Connections:
    """Make ``app`` use these classes, and return its open connections.

    Routes that are ``unlogged`` have no entries in the access log: probes would drown the others.
    """
    connections = app.extensions[CONNECTIONS] = Connections()
    app.extensions[_TRACING] = tracing
    app.extensions[_UNLOGGED] = unlogged
    app.request_class = ApiRequest
    app.asgi_http_class = HttpConnection
    return connections
