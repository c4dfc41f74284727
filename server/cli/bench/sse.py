"""A parser for server-sent events that arrive in pieces of any size."""

from server.cli.bench.errors import RequestFailedError

_MOST_BYTES = 16 * 1024 * 1024


class EventReader:
    """Parses the data of events, after the section "Server-sent events" of the HTML standard.

    Lines end with LF or CRLF; names and ids of events are ignored.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that this piece completes.

        Raises:
            RequestFailedError: a line is not a field of an event, or is too long.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif not line.startswith((b":", b"event", b"id", b"retry")):
                raise RequestFailedError("malformed event", repr(line[:80]))
        if len(self._rest) > _MOST_BYTES:
            raise RequestFailedError("malformed event", f"a line of {len(self._rest)} bytes")
        return events

    @property
    def empty(self) -> bool:
        """Whether there is no incomplete event."""
        return not (self._rest or self._data)
