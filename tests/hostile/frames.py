"""An HTTP/2 client that sends whatever frames it is told to, sound or not."""

import socket
from collections import defaultdict
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Header = tuple[str | bytes, str | bytes]


class Frames:
    """A connection, and what came over it.

    Attributes:
        status: by stream.
        data: by stream.
        reset: error codes by stream.
        gone: the error code of GOAWAY; None: none came.
        closed: the server has closed the connection.
    """

    def __init__(self, port: int) -> None:
        self.raw = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._encoder, self._decoder = Encoder(), Decoder()
        self._received = b""
        self.status: dict[int, int] = {}
        self.data: defaultdict[int, bytes] = defaultdict(bytes)
        self.ended: set[int] = set()
        self.reset: dict[int, int] = {}
        self.gone: int | None = None
        self.pings = 0
        self.closed = False
        self.raw.sendall(PREFACE + SettingsFrame(0).serialize())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.raw.close()

    def send(self, *frames: Frame) -> None:
        """Send frames in one piece."""
        self.raw.sendall(b"".join(frame.serialize() for frame in frames))

    def headers(self, stream: int, headers: Iterable[Header], *flags: str) -> HeadersFrame:
        """A HEADERS frame; ``flags`` besides END_HEADERS."""
        frame = HeadersFrame(stream, flags=["END_HEADERS", *flags])
        frame.data = self._encoder.encode(list(headers), huffman=False)
        return frame

    def body(self, stream: int, data: bytes, *flags: str) -> DataFrame:
        """A DATA frame."""
        return DataFrame(stream, data, flags=list(flags))

    def over(self, stream: int) -> bool:
        """Whether nothing more is to come on a stream."""
        return self.closed or stream in self.ended or stream in self.reset

    def wait(self, *streams: int) -> None:
        """Read until these streams are over."""
        while not all(map(self.over, streams)):
            self.read()

    def wait_closed(self) -> None:
        """Read until the server closes the connection."""
        while not self.closed:
            self.read()

    def pinged(self) -> None:
        """Have the server show that the connection lives."""
        before = self.pings
        self.send(PingFrame(0, b"12345678"))
        while self.pings == before:
            assert not self.closed
            self.read()

    def read(self) -> None:
        """Read what comes next."""
        try:
            part = self.raw.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            self.closed = True
        self._received += part
        while len(self._received) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(self._received[:9]))
            if len(self._received) < 9 + length:
                break
            frame.parse_body(memoryview(self._received[9 : 9 + length]))
            self._received = self._received[9 + length :]
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        match frame:
            case HeadersFrame():
                found = dict(self._decoder.decode(frame.data))
                self.status[frame.stream_id] = int(found[":status"])
            case DataFrame():
                self.data[frame.stream_id] += frame.data
            case RstStreamFrame():
                self.reset[frame.stream_id] = frame.error_code
            case GoAwayFrame():
                self.gone = frame.error_code
            case PingFrame():
                self.pings += "ACK" in frame.flags
        if isinstance(frame, HeadersFrame | DataFrame) and "END_STREAM" in frame.flags:
            self.ended.add(frame.stream_id)
