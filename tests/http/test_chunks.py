"""Chunks of a stream: what they are on the wire, and that Hypercorn has no work with them."""

from typing import Any

import pytest
from hypercorn.protocol.events import Body
from hypercorn.protocol.h11 import H11Protocol

from tests.support.fake_server import CHAT, REPLY, Rig
from tests.support.raw_http import exchange, parse_stream, post

BODY = {"model": CHAT, "prompt": "Hi", "stream": True, "max_tokens": 60}


@pytest.fixture
def through_hypercorn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The chunks that Hypercorn writes from now on."""
    found: list[bytes] = []
    original = H11Protocol.stream_send

    async def stream_send(self: H11Protocol, event: Any) -> None:
        if isinstance(event, Body):
            found.append(event.data)
        await original(self, event)

    monkeypatch.setattr(H11Protocol, "stream_send", stream_send)
    return found


def _text(stream: str) -> str:
    return "".join(
        event["choices"][0]["text"] for event in parse_stream(stream) if isinstance(event, dict)
    )


def test_chunks_of_a_stream_are_written_at_once(rig: Rig, through_hypercorn: list[bytes]) -> None:
    assert _text(rig.post("/v1/completions", BODY).text) == REPLY
    assert through_hypercorn == []


def test_chunks_are_framed_as_rfc_9112_says(rig: Rig) -> None:
    received = exchange(rig.server.port, post("/v1/completions", BODY, "Connection: close"))
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    text = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        chunk, end, rest = (
            rest[: int(size, 16)],
            rest[int(size, 16) :][:2],
            rest[int(size, 16) + 2 :],
        )
        assert end == b"\r\n"
        if not chunk:
            break
        text += chunk
    assert rest == b""
    assert _text(text.decode()) == REPLY


def test_a_client_of_http_1_0_gets_bytes_until_the_end(
    rig: Rig, through_hypercorn: list[bytes]
) -> None:
    request = post("/v1/completions", BODY).replace(b"HTTP/1.1", b"HTTP/1.0")
    head, _, text = exchange(rig.server.port, request).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert _text(text.decode()) == REPLY
    assert b"".join(through_hypercorn) == text
