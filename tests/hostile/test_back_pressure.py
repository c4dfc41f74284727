"""A reader that cannot keep up pauses its own generation, and is dropped if it never reads on."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import orjson
import psutil
import pytest
from websockets.sync.client import ClientConnection, connect

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, Rig
from tests.support.machine_speed import Machine
from tests.support.raw_http import events, post
from tests.support.waiting import until

pytestmark = pytest.mark.alone

TOKENS = 60_000
BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": TOKENS, "stream": True, "logprobs": 5}
SMALL_BUFFER = 4096


@pytest.fixture
def endless(rig: Rig, tokenizer: Tokenizer) -> Rig:
    """An engine that writes as fast as it can."""
    rig.engine.script = writes(tokenizer, "go on ", end=False)
    return rig


@contextmanager
def slow_sse(rig: Rig) -> Iterator[socket.socket]:
    """A stream whose client has read nothing yet, and has little room for it."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        raw.connect(("127.0.0.1", rig.server.port))
        raw.sendall(post("/v1/completions", BODY))
        yield raw


@contextmanager
def slow_websocket(rig: Rig) -> Iterator[ClientConnection]:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    raw.connect(("127.0.0.1", rig.server.port))
    url = rig.ws + "/v1/completions"
    with connect(url, sock=raw, max_queue=1, close_timeout=0, ping_interval=None) as ws:
        ws.send(orjson.dumps(BODY).decode())
        yield ws


def settled(rig: Rig) -> int:
    """Tokens written once the buffers between server and client are full."""
    rig.engine.wait_until(lambda e: e.num_paused == 1)
    deadline, written = time.monotonic() + 10, -1
    while written != (written := rig.engine.num_written):
        assert time.monotonic() < deadline
        for _ in range(20):  # the server's loop turns: what it could send has been sent
            rig.client.get("/health")
    return written


@pytest.mark.parametrize("slow", [slow_sse, slow_websocket])
def test_a_slow_reader_pauses_its_own_generation_and_nobody_elses(endless: Rig, slow: Any) -> None:
    engine = endless.engine
    asked = {"model": CHAT, "prompt": "Hi", "max_tokens": 500}
    with slow(endless):
        stopped_at = settled(endless)
        assert stopped_at < TOKENS / 5
        before = psutil.Process().memory_info().rss
        for _ in range(5):
            assert endless.post("/v1/completions", asked).status_code == 200
        assert (engine.num_paused, engine.num_written) == (1, stopped_at)
        assert psutil.Process().memory_info().rss - before < 32 * 2**20
    engine.wait_until(lambda e: e.num_running == 0)


def test_a_reader_that_reads_on_gets_every_token(endless: Rig) -> None:
    with slow_sse(endless) as raw:
        settled(endless)
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += raw.recv(2**20)
    assert received.count(b'"finish_reason":"length"') == 1
    assert received.count(b"data: [DONE]") == 1
    chunks = events(received.decode().splitlines())
    assert len("".join(chunk["choices"][0]["text"] for chunk in chunks)) == TOKENS


@pytest.mark.parametrize("slow", [slow_sse, slow_websocket])
def test_a_reader_that_never_reads_on_is_dropped(
    endless: Rig, slow: Any, monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    monkeypatch.setattr("server.http.transport.STALL_SECONDS", 0.3)
    begun = time.monotonic()
    with slow(endless):
        endless.engine.wait_until(lambda e: len(e.aborted) == 1 and e.num_running == 0)
    assert 0.3 <= time.monotonic() - begun < machine.seconds(5)


def test_a_plain_answer_never_pauses_for_good(endless: Rig) -> None:
    asked = {"model": CHAT, "prompt": "Hi", "max_tokens": 5000, "n": 4}
    choices = endless.post("/v1/completions", asked).json()["choices"]
    assert [len(choice["text"]) for choice in choices] == [5000] * 4


@pytest.mark.parametrize("ends", [b"Connection: close\r\n", b""])
def test_an_answer_whose_end_is_never_read_keeps_no_connection(
    rig: Rig, ends: bytes, monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    monkeypatch.setattr("server.http.transport.STALL_SECONDS", 0.3)
    monkeypatch.setattr(rig.server.config, "keep_alive_timeout", 0.1)
    with ExitStack() as readers:
        for size in range(60_000, 250_000, 8_000):  # the application ends with some part unsent
            content = orjson.dumps({"prompt": "the" * (size // 3)})
            head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + ends
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            raw = readers.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            raw.connect(("127.0.0.1", rig.server.port))
            raw.sendall(head + content)
        # that of the fixture's own client
        until(lambda: served(rig) <= 1, machine.seconds(10))


def served(rig: Rig) -> int:
    """Connections that the server has open."""
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == rig.server.port
        for each in psutil.Process().net_connections()
    )
