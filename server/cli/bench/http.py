"""A lightweight HTTP/1.1 client, so that the load takes little processor time from the server.

It supports what a benchmark needs: requests with a JSON body, answers of any framing, and
persistent connections. Bytes are passed on with their time of arrival, without waking a task.
"""

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

from server.cli.bench.errors import BenchError, RequestFailedError

_MOST_HEAD = 64 * 1024
_HEX = re.compile(rb"[0-9A-Fa-f]{1,15}")
_PORTS = {"http": 80, "https": 443}

Sink = Callable[[bytes, float], None]
"""Receives a piece of an answer's body and its time of arrival."""


class ResponseReader:
    """Parses one answer from bytes that arrive in pieces of any size (RFC 9112).

    Attributes:
        status: the status of the answer; 0 before its head is complete.
        begun: whether any byte has arrived.
        done: whether the answer is complete.
        keeps: whether the connection can be reused.
    """

    def __init__(self) -> None:
        self.status = 0
        self.begun = self.done = False
        self.keeps = True
        self._buffer = b""
        self._left: int | None = (
            None  # remaining bytes of the body or chunk; None: until the connection ends
        )
        self._step: Callable[[list[bytes]], bool] = self._head

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces of the body in these bytes.

        Raises:
            RequestFailedError: the bytes are not an HTTP answer.
        """
        self.begun = True
        self._buffer = self._buffer + data if self._buffer else data
        pieces: list[bytes] = []
        while not self.done and self._step(pieces):
            pass
        return pieces

    def feed_end(self) -> None:
        """Handle the end of the connection.

        Raises:
            RequestFailedError: the answer is incomplete.
        """
        if self._step == self._body and self._left is None:
            self.done = True
        if not self.done:
            raise RequestFailedError("connection cut")

    def _head(self, pieces: list[bytes]) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            if len(head) > _MOST_HEAD:
                raise RequestFailedError("malformed answer", "its head never ends")
            return False
        self._buffer = rest
        first, *fields = head.split(b"\r\n")
        version, _, status = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise RequestFailedError("malformed answer", repr(first[:80]))
        if status.startswith(b"1"):
            return True  # an interim answer: the final one follows
        headers = {}
        for line in fields:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip().lower()
        self.status = int(status[:3])
        said = headers.get(b"connection", b"")
        self.keeps = version == b"HTTP/1.1" and b"close" not in said
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            self._step = self._size
        else:
            length = headers.get(b"content-length")
            if length is not None and not length.isdigit():
                raise RequestFailedError("malformed answer", f"a length of {length[:80]!r}")
            self._left = None if length is None else int(length)
            self.keeps = self.keeps and length is not None
            self.done = self._left == 0
            self._step = self._body
        return True

    def _body(self, pieces: list[bytes]) -> bool:
        if self._buffer:
            piece = self._buffer[: self._left]
            pieces.append(piece)
            self._buffer = self._buffer[len(piece) :]
            if self._left is not None:
                self._left -= len(piece)
                self.done = self._left == 0
        return False

    def _size(self, pieces: list[bytes]) -> bool:
        line = self._line()
        if line is None:
            return False
        size = line.partition(b";")[0].strip()
        if not _HEX.fullmatch(size):
            raise RequestFailedError("malformed answer", f"a chunk of {line[:80]!r}")
        self._left = int(size, 16)
        self._step = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, pieces: list[bytes]) -> bool:
        assert self._left is not None
        size = self._left
        if len(self._buffer) < size + 2:
            # A part of a chunk is passed on at once, because its arrival is measured.
            if part := self._buffer[:size]:
                pieces.append(part)
                self._left -= len(part)
                self._buffer = self._buffer[len(part) :]
            return False
        if self._buffer[size : size + 2] != b"\r\n":
            raise RequestFailedError("malformed answer", "a chunk is longer than it said")
        if size:
            pieces.append(self._buffer[:size])
        self._buffer = self._buffer[size + 2 :]
        self._step = self._size
        return True

    def _trailer(self, pieces: list[bytes]) -> bool:
        line = self._line()
        self.done = line == b""
        return bool(line)

    def _line(self) -> bytes | None:
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            if len(line) > _MOST_HEAD:
                raise RequestFailedError("malformed answer", "a line never ends")
            return None
        self._buffer = rest
        return line


class _Connection(asyncio.Protocol):
    """A connection, which handles one request at a time."""

    def __init__(self) -> None:
        self.usable = True
        self._transport: asyncio.Transport
        self._reader = ResponseReader()
        self._sink: Sink
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def exchange(self, request: bytes, reader: ResponseReader, sink: Sink) -> None:
        """Send a request, and return when its answer is complete."""
        self._reader, self._sink = reader, sink
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if not (reader.done and reader.keeps):
                self.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._waiter is None or self._waiter.done():
            self.close()  # no request was sent
            return
        try:
            for piece in self._reader.feed(data):
                self._sink(piece, now)
        except RequestFailedError as error:
            self._waiter.set_exception(error)
        else:
            if self._reader.done:
                self._waiter.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._waiter is None or self._waiter.done():
            return
        try:
            self._reader.feed_end()
        except RequestFailedError as cut:
            self._waiter.set_exception(cut)
        else:
            self._waiter.set_result(None)

    def close(self) -> None:
        self.usable = False
        self._transport.abort()


class Client:
    """Sends requests to one server over persistent connections.

    Args:
        url: the URL of the server, with or without ``/v1``.
        api_key: an API key, sent as a bearer token.

    Raises:
        BenchError: the URL is invalid.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in _PORTS or not parts.hostname or port == -1:
            raise BenchError(f"the URL is {url!r}; write it as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, port or _PORTS[parts.scheme]
        self._path = parts.path
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = (
            f"Host: {parts.netloc.rpartition('@')[2]}\r\n{key}"
            "Content-Type: application/json\r\nUser-Agent: inferneo-bench\r\n"
        )
        if not self._headers.isascii() or "\n" in (api_key or ""):
            raise BenchError("URL and API key must be plain ASCII")
        self._idle: list[_Connection] = []

    async def request(self, path: str, body: bytes | None, sink: Sink) -> int:
        """POST a JSON body, or GET; pass the answer's body to the sink and return its status.

        Raises:
            RequestFailedError: there was no complete answer.
        """
        method = "GET" if body is None else "POST"
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
        size = "" if body is None else f"Content-Length: {len(body)}\r\n"
        message = f"{head}{size}\r\n".encode() + (body or b"")
        while True:
            kept = next((c for c in iter(self._take, None) if c.usable), None)
            connection = kept or await self._connect()
            reader = ResponseReader()
            try:
                await connection.exchange(message, reader, sink)
            except RequestFailedError:
                if kept and not reader.begun:
                    continue  # the server had closed the connection that we kept
                raise
            if connection.usable:
                self._idle.append(connection)
            return reader.status

    def _take(self) -> _Connection | None:
        return self._idle.pop() if self._idle else None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(
                _Connection, self._host, self._port, ssl=self._ssl
            )
        except OSError as error:
            raise RequestFailedError("cannot connect", error.strerror or str(error)) from None
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # transports close in the next iteration of the loop
