"""A server with keys in a process of its own, and sockets that are spoken to by hand."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx

from server.keys.key import SCOPES
from server.keys.store.open import open_store
from tests.support.keyed_server import add_key
from tests.support.server_process import environment
from tests.support.waiting import until

PATH = "/v1/chat/completions"
TEXT, BINARY = 0x81, 0x82
_HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
)


class Served:
    """A running server, the text of a key of it, and what it has written."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, key: str, log: Path) -> None:
        self.process, self.port, self.key = process, port, key
        self.bearer = f"Authorization: Bearer {key}\r\n"
        self._log = log

    def memory(self) -> float:
        """Of its process, resident now, in MB."""
        return self._status("VmRSS")

    def peak(self) -> float:
        """The most of it since :meth:`forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def num_sockets(self) -> float:
        """WebSockets that it counts as open."""
        return sum(self.figures("inferneo_websockets_open").values())

    def figures(self, name: str) -> dict[str, float]:
        """Those of this name, by their labels."""
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.get(f"http://127.0.0.1:{self.port}/metrics", headers=headers)
        return {
            labels: float(value)
            for labels, value in re.findall(rf"{name}{{(.*)}} (.*)", answer.text)
        }

    def events(self, name: str) -> list[dict[str, object]]:
        """The log's lines of this event."""
        lines = self._log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def _status(self, field: str) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", text)
        assert found, text
        return int(found[1]) / 1024


@contextlib.contextmanager
def serving(folder: Path, **settings: str) -> Iterator[Served]:
    """`inferneo serve` on fake models; it demands keys."""
    location, log = str(folder / "keys.db"), folder / "log"
    store = open_store(location)
    _, text = add_key(store, scopes=frozenset(SCOPES))
    store.close()
    env = environment(
        {
            "INFERNEO_KEYS_DB": location,
            "INFERNEO_CHECKPOINTS": str(folder),
            "INFERNEO_PORT": "0",
            "INFERNEO_LOG_FORMAT": "json",
            "INFERNEO_REQUIRE_KEY": "true",
            **settings,
        }
    )
    command = [sys.executable, "-m", "tests.support.serve_fakes"]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, env=env) as process:

        def port() -> re.Match[str] | None:
            assert process.poll() is None, log.read_text()
            written = log.read_text()
            ready = '"ready"' in written
            return re.search(r"Running on http://[^:]+:(\d+)", written) if ready else None

        try:
            found = until(port, 60, log.read_text)
            yield Served(process, int(found[1]), text, log)
        finally:
            process.kill()


def frame(payload: bytes, kind: int = TEXT, length: int | None = None) -> bytes:
    """A client's frame; ``length``: what its head says, if that is not true."""
    length = len(payload) if length is None else length
    short, width = (length, 0) if length < 126 else (126, 2) if length < 65_536 else (127, 8)
    size = bytes([0x80 | short]) + length.to_bytes(8, "big")[8 - width :]
    return bytes([kind]) + size + bytes(4) + payload  # masked with zeros: as it is


class Socket:
    """One end of a connection, and the status that its handshake was answered with."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.status = 0

    async def send(self, data: bytes) -> bool:
        """Send as much as is taken; whether that was all."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            return False
        return True

    async def message(self) -> bytes:
        """The payload of the next frame, which is not to close the socket."""
        kind, payload = await self._frame()
        assert kind == 1, (kind, payload)
        return payload

    async def closing(self) -> tuple[int, list[bytes]]:
        """The close frame's code, and the frames before it."""
        frames = []
        while True:
            kind, payload = await self._frame()
            if kind == 8:
                return int.from_bytes(payload[:2], "big"), frames
            frames.append(payload)

    async def _frame(self) -> tuple[int, bytes]:
        head = await self.reader.readexactly(2)
        length = head[1]
        if length == 126:
            length = int.from_bytes(await self.reader.readexactly(2), "big")
        return head[0] & 0x0F, await self.reader.readexactly(length)


@contextlib.asynccontextmanager
async def socket_to(
    served: Served, more: str = "", *, source: str = "127.0.0.1", ahead: bytes = b""
) -> AsyncIterator[Socket]:
    """A connection whose handshake has been answered.

    Args:
        served: the server.
        more: lines of the handshake's head.
        source: the client's address.
        ahead: what is sent in one piece with the handshake.
    """
    opening = asyncio.open_connection("127.0.0.1", served.port, local_addr=(source, 0))
    made = Socket(*await opening)
    try:
        made.writer.write(_HANDSHAKE.format(path=PATH, more=more).encode() + ahead)
        answer = await made.reader.readuntil(b"\r\n\r\n")
        made.status = int(answer.split()[1])
        yield made
    finally:
        made.writer.transport.abort()
