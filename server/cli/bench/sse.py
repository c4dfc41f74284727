"""Server-sent events out of bytes, however these were cut."""

from server.cli.bench.errors import RequestFailedError

_MOST_BYTES = 16 * 1024 * 1024


class EventReader:
    """The data of events, as in the HTML standard's "Server-sent events" section.

    Lines end with LF or CRLF, as every server writes them; names and ids of events are not read.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of those events that this piece completes.

        Raises:
            RequestFailedError: a line is no field of an event, or never ends.
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
        """Whether no event has begun that is not complete."""
        return not (self._rest or self._data)
