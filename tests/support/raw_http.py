"""Raw HTTP/1.1, for tests that manage a connection themselves, and server-sent events."""

import socket
from collections.abc import Iterable
from typing import Any

import orjson

EVENT = "data: "


def post(
    path: str, body: Any = None, *headers: str, host: str = "localhost", length: int | None = None
) -> bytes:
    """A request with a JSON body, or its head alone.

    Args:
        path: its target.
        body: serialized as JSON; None sends the head alone.
        headers: further lines of the head.
        host: its ``Host``.
        length: the length that the head declares, where the body does not follow.
    """
    content = b"" if body is None else orjson.dumps(body)
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(content) if length is None else length}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(head).encode() + content


def exchange(port: int, sent: bytes, *, leave: bool = False) -> bytes:
    """All that is answered until the server closes the connection.

    Args:
        port: the server's.
        sent: one request or several.
        leave: the client says that it sends no more.
    """
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(sent)
        if leave:
            raw.shutdown(socket.SHUT_WR)
        try:
            while part := raw.recv(65536):
                received += part
        except ConnectionResetError:  # the server did not read everything
            pass
    return received


def events(lines: Iterable[str]) -> list[Any]:
    """What the lines of a stream hold as JSON: neither comments nor ``[DONE]``."""
    return [event for line in lines if (event := event_of(line)) is not None]


def event_of(line: str) -> Any:
    """What a line of a stream holds as JSON; None for any other line."""
    return orjson.loads(line.removeprefix(EVENT)) if line.startswith(EVENT + "{") else None


def parse_stream(text: str) -> list[Any]:
    """The events of a stream that must end with ``[DONE]``, and its comments as text."""
    *blocks, done, rest = text.split("\n\n")
    assert (done, rest) == (f"{EVENT}[DONE]", "")
    assert all(block.startswith((":", EVENT)) for block in blocks)
    return [block if block.startswith(":") else event_of(block) for block in blocks]
