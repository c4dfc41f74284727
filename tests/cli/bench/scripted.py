"""A server that answers as a test says, byte by byte, to every request the same or in turn."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

from server.cli.bench.api import Api
from server.cli.bench.http import Client
from server.cli.bench.load import Level, Requests, Work, run_level
from server.cli.bench.stats import Sample

Reply = bytes | list[bytes | float | None]
"""Bytes to send; within a list also seconds to wait, and None to reset the connection."""


def event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = chunk(event({"choices": [{"text": "a"}]}))
END = chunk(
    event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})
    + b"data: [DONE]\n\n"
) + chunk(b"")
GOOD = HEAD + TOKEN + TOKEN + END


def status(code: int, message: str = "no", *headers: str) -> bytes:
    body = orjson.dumps({"error": {"message": message}})
    lines = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Scripted:
    """The server, and what it was asked.

    Attributes:
        requests: bodies, parsed.
        most: requests that were under way at once.
        connections: how many were made.
    """

    def __init__(self, reply: Callable[[int], Reply]) -> None:
        self._reply = reply
        self.requests: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.most = self.connections = self._now = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0] or 0)
                self.heads.append(head)
                self.requests.append(orjson.loads(await reader.readexactly(length) or b"{}"))
                self._now += 1
                self.most = max(self.most, self._now)
                reply = self._reply(len(self.requests) - 1)
                try:
                    for part in reply if isinstance(reply, list) else [reply]:
                        if part is None:
                            writer.transport.abort()
                        elif isinstance(part, float):
                            await asyncio.sleep(part)
                        else:
                            writer.write(part)
                            await writer.drain()
                finally:
                    self._now -= 1
        writer.close()


@contextlib.asynccontextmanager
async def scripted(reply: Reply | Callable[[int], Reply]) -> AsyncIterator[tuple[Scripted, str]]:
    made = Scripted(reply if callable(reply) else lambda _: reply)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield made, f"http://127.0.0.1:{port}"
    finally:
        server.close()


async def samples_of(
    url: str, count: int = 4, clients: int | None = 2, **how: Any
) -> tuple[list[Sample], Requests]:
    """Samples of some requests, and what did them."""
    rate = how.pop("rate", None)
    work = Work(prompt_tokens=20, output_tokens=2, **{"timeout": 5.0} | how)
    async with Client(url) as client:
        requests = Requests(Api(client, "model"), work)
        level = Level(clients=clients, rate=rate, requests=count, seconds=30.0)
        return await run_level(requests.job, level, 0, 0), requests
