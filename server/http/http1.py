"""Strict parsing of HTTP/1.1: a request that two parsers could read differently is rejected.

h11 (0.16) is lenient where RFC 9112 allows it. A proxy in front of the server may be lenient in
other ways; then the two disagree on where a request ends, and what one takes for a body is the next
request to the other (request smuggling).
"""

import re
from typing import Any

import h11
import orjson
import structlog
from h11._receivebuffer import ReceiveBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import H11SendableEvent

from server.http.errors import bad_request
from server.http.locality import is_host

log = structlog.get_logger(__name__)

MAX_CHUNK_LINE = 256
"""Most bytes of a line that begins a chunk: its size, and extensions that nobody reads."""
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HEAD_END = b"\r\n\r\n"
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]*)([^#]*)")
_PREFACE = (b"PRI", b"*", b"2.0")
"""Of HTTP/2, which Hypercorn then takes over."""


class _StrictBuffer(ReceiveBuffer):
    """Bytes received, from which lines are taken that end as RFC 9112 (2.2) says."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a head or a trailer without their ends; None until all of it has come."""
        if self._data.startswith(b"\r\n"):
            self._extract(2)
            return []
        searched = max(0, self._multiple_lines_search - len(_HEAD_END))
        end = self._data.find(_HEAD_END, searched)
        if _BARE_LF.search(self._data, searched, len(self._data) if end == -1 else end):
            raise h11.LocalProtocolError("a line ends with LF alone, and must with CR LF")
        if end == -1:
            self._multiple_lines_search = len(self._data)
            return None
        lines = self._extract(end + len(_HEAD_END))[: -len(_HEAD_END)].split(b"\r\n")
        for line in lines:
            if line.startswith((b" ", b"\t")):
                raise h11.LocalProtocolError("a header goes on in a second line")
            if _CONTROL.search(line):
                raise h11.LocalProtocolError("the head holds a control character")
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line that begins a chunk, with its end; None until it has come."""
        line = super().maybe_extract_next_line()
        if len(self._data if line is None else line) > MAX_CHUNK_LINE:
            raise h11.LocalProtocolError(
                f"the line before a chunk has more than {MAX_CHUNK_LINE} bytes"
            )
        if line is not None and _CONTROL.search(line, 0, len(line) - 2):
            raise h11.LocalProtocolError("the line before a chunk holds a control character")
        return line


class StrictConnection(h11.Connection):
    """The server's end of an HTTP/1.1 connection.

    Attributes:
        fault: what is wrong with what the client sent, once that is known.
    """

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=max_incomplete_event_size)
        self._receive_buffer = _StrictBuffer()
        self.fault: str | None = None

    def next_event(self) -> Any:
        """See :class:`h11.Connection`."""
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            if self.fault is None:
                # What h11 repeats of the request, behind a colon, may be a secret.
                self.fault = str(error).partition(":")[0]
            raise

    def _extract_next_receive_event(self) -> Any:
        event = super()._extract_next_receive_event()
        return _checked(event) if isinstance(event, h11.Request) else event


def _checked(request: h11.Request) -> h11.Request:
    """The request, its target a path.

    Raises:
        LocalProtocolError: it is ambiguous, or of another version of HTTP.
    """
    version, headers = request.http_version, dict(request.headers)
    if (request.method, request.target, version) == _PREFACE:
        return request
    if not version.startswith(b"1."):
        raise h11.LocalProtocolError("the version of HTTP is not 1.0 or 1.1", 505)
    if b"transfer-encoding" in headers and (b"content-length" in headers or version == b"1.0"):
        raise h11.LocalProtocolError(
            "Transfer-Encoding and Content-Length exclude each other, as do Transfer-Encoding and "
            "HTTP/1.0"
        )
    host = headers.get(b"host", b"")
    if not is_host(host.decode("latin-1")):
        raise h11.LocalProtocolError("Host is no name or address, with or without a port")
    if request.target.startswith(b"/") or (request.method, request.target) == (b"OPTIONS", b"*"):
        return request
    absolute = _ABSOLUTE.fullmatch(request.target)
    if absolute is None or absolute[1].lower() != host.lower():
        raise h11.LocalProtocolError(
            "the target is neither a path, which begins with /, nor a URL of the very Host"
        )
    path = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
    return h11.Request(
        method=request.method, target=path, headers=list(request.headers), http_version=version
    )


_init = H11Protocol.__init__
_send_error_response = H11Protocol._send_error_response


def patch() -> None:
    """Have Hypercorn parse strictly, and say in its 400 responses what was wrong."""
    H11Protocol.__init__ = _init_strict  # type: ignore[method-assign]
    H11Protocol._send_error_response = _explain  # type: ignore[method-assign]


def _init_strict(self: H11Protocol, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    self.connection = StrictConnection(self.config.h11_max_incomplete_size)


async def _explain(self: H11Protocol, status_code: int) -> None:
    fault = getattr(self.connection, "fault", None) or "it cannot be read"
    if not self.connection.trailing_data[1]:  # else the client has closed the connection
        log.info("request_malformed", status=status_code, reason=fault)
    error = bad_request(f"The request is not valid HTTP/1.1: {fault}.", code="malformed_request")
    body = orjson.dumps(error.envelope())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *self.config.response_headers("h11"),
    ]
    events: list[H11SendableEvent] = [
        h11.Response(status_code=status_code, headers=headers),
        h11.Data(data=body),
        h11.EndOfMessage(),
    ]
    for event in events:
        await self._send_h11_event(event)
