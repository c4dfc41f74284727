"""What is worked around in Hypercorn and Quart, shown with applications that are not ours.

A test that fails here says that upstream has fixed something, and what can go.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hpack import Encoder
from hypercorn.asyncio import serve
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer
from hyperframe.frame import HeadersFrame, SettingsFrame
from quart import Quart
from quart.wrappers.request import Body
from websockets.asyncio.client import connect
from werkzeug.exceptions import RequestEntityTooLarge
from wsproto.events import TextMessage

from server.http import http1, http2, transport

Application = Callable[..., Any]
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
ALL = b"HTTP/1.1 200"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()


@pytest.fixture(autouse=True)
def as_upstream_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo ``transport.patch_hypercorn``, which other tests in this process may have called."""
    monkeypatch.setattr(H11Protocol, "_check_protocol", transport._check_protocol)
    monkeypatch.setattr(H11Protocol, "__init__", http1._init)
    monkeypatch.setattr(H11Protocol, "_send_error_response", http1._send_error_response)
    monkeypatch.setattr(TCPServer, "_read_data", transport._read_data)
    monkeypatch.setattr(H2Protocol, "handle", http2._handle)
    monkeypatch.setattr(H2Protocol, "initiate", http2._initiate)
    monkeypatch.setattr(H2Protocol, "_handle_events", http2._handle_events)


@asynccontextmanager
async def running(app: Application, **changes: Any) -> AsyncIterator[int]:
    """The port of an application under Hypercorn."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config, ended = Config(), asyncio.Event()
    config.bind, config.errorlog = [f"fd://{listener.detach()}"], None
    config.graceful_timeout = 0.1
    for name, value in changes.items():
        setattr(config, name, value)
    task = asyncio.create_task(serve(app, config, shutdown_trigger=ended.wait))  # type: ignore[arg-type]
    try:
        yield port
    finally:
        ended.set()
        await task


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def answer(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"all"})


async def lifespan(scope: Any, receive: Any, send: Any) -> bool:
    """Whether this was the start or the end of the application."""
    if scope["type"] == "lifespan":
        for name in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{name}.complete"})
    return bool(scope["type"] == "lifespan")


async def short(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once."""
    if not await lifespan(scope, receive, send):
        await answer(send)


async def test_upgrade_to_h2c_is_taken() -> None:
    """Or ``_check_without_h2c`` in transport.py can go."""
    head = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    async with running(short) as port, connected(port) as (reader, writer):
        writer.write(head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 101")


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\r\n c\r\n\r\n",
        b"GET http://y/ HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_h11_takes_what_others_may_understand_differently(head: bytes) -> None:
    """Or parts of http1.py can go."""
    async with running(short) as port, connected(port) as (reader, writer):
        writer.write(head)
        assert (await reader.readline()).startswith(ALL)


async def test_a_connection_that_sends_http2s_preface_alone_is_held() -> None:
    """Or ``_initiate_idle`` in http2.py can go."""
    async with running(short, keep_alive_timeout=0.1) as port, connected(port) as (reader, writer):
        writer.write(PREFACE)
        assert await reader.readexactly(9)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.4)


async def test_bytes_beyond_ascii_in_a_path_of_http2_end_the_connection() -> None:
    """Or parts of ``_fault`` in http2.py can go."""
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, found: failures.append(found))
    headers = [(":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", b"/\xc3")]
    frame = HeadersFrame(1, flags=["END_HEADERS", "END_STREAM"])
    frame.data = Encoder().encode(headers)
    async with running(short) as port, connected(port) as (reader, writer):
        writer.write(PREFACE + frame.serialize())
        await reader.read()
    assert "UnicodeDecodeError" in repr(failures)


async def test_a_connection_that_its_client_has_closed_is_held() -> None:
    """Or ``_read_until_closed`` in transport.py can go."""
    async with running(short, keep_alive_timeout=0.4) as port, connected(port) as (reader, writer):
        writer.write(GET)
        await reader.readuntil(b"all")
        writer.write_eof()
        started = time.monotonic()
        await reader.read()
        assert time.monotonic() - started > 0.2


async def test_pipelined_bytes_hide_that_a_client_has_gone() -> None:
    """Or ``DisconnectWatcher`` in transport.py can go."""
    asked, told = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not await lifespan(scope, receive, send):
            await receive()  # the body's end
            asked.set()
            await receive()
            told.set()

    async with running(app) as port:
        async with connected(port) as (_, writer):
            writer.write(GET + b"GET /")
            await asked.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await told.wait()


def test_there_is_no_bound_on_how_long_a_client_may_not_read() -> None:
    """Or ``WriteTimeout`` in transport.py can go."""
    names = [name for name in dir(Config) if "timeout" in name]
    assert "read_timeout" in names
    assert not [name for name in names if "write" in name or "send" in name]


def test_a_frame_that_is_too_long_is_kept_whole() -> None:
    """Or ``Inbox`` in frames.py can go."""
    buffer = WebsocketBuffer(4)
    with pytest.raises(FrameTooLargeError):
        buffer.extend(TextMessage(data="x" * 100))
    assert buffer.length == 100


async def test_pings_keep_a_closed_connection() -> None:
    """Or ``pinged`` in frames.py can go, and Hypercorn's ``websocket_ping_interval`` be set."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not await lifespan(scope, receive, send):
            await send({"type": "websocket.accept"})
            while (await receive())["type"] != "websocket.disconnect":
                pass

    async with running(app, websocket_ping_interval=0.4) as port:
        before = asyncio.all_tasks()
        async with connect(f"ws://127.0.0.1:{port}"):
            pass
        await asyncio.sleep(0.1)
        assert [task for task in asyncio.all_tasks() - before if "_send_pings" in str(task)]
        await asyncio.sleep(0.4)


def in_a_process(source: str, folder: Path, *options: str) -> tuple[Any, int]:
    """Hypercorn with an application of this source, and its port."""
    (folder / "plain.py").write_text(source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hypercorn", "-b", f"127.0.0.1:{port}", *options, "plain:app"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    return process, port


async def test_streams_are_cut_without_a_word_at_the_end() -> None:
    """Or ``held_up`` in shutdown.py can go."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if await lifespan(scope, receive, send):
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"more", "more_body": True})
            await asyncio.sleep(0.01)

    async with running(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await reader.readuntil(b"more")
    assert (await reader.read()).endswith(b"more\r\n")  # and not the chunk that ends a body
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


LOST = """
import asyncio
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await asyncio.sleep(0.3)
        raise SystemExit(7)
"""


def test_a_worker_that_fails_after_its_start_is_not_told_of(tmp_path: Path) -> None:
    """Or the signal in exit.py can go."""
    process, _ = in_a_process(LOST, tmp_path)
    try:
        process.wait(20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_quart_ends_long_answers_and_lists_methods_of_sockets() -> None:
    """Or what ``create_app`` does about ``RESPONSE_TIMEOUT`` and ``rule.methods`` can go."""
    app = Quart("plain")
    assert app.config["RESPONSE_TIMEOUT"] == 60

    @app.websocket("/socket")
    async def opened() -> None: ...

    (rule,) = (rule for rule in app.url_map.iter_rules() if rule.rule == "/socket")
    assert "GET" in (rule.methods or ())


async def test_quart_drops_a_body_that_is_too_large_unread() -> None:
    """Or ``LimitedBody`` in body.py can go."""
    body = Body(None, 10)
    body.append(b"x" * 11)
    with pytest.raises(RequestEntityTooLarge):
        await body
    assert not hasattr(body, "drain")
