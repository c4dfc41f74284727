"""HTTP/1.1 that two readers could understand differently is refused, and the connection closed."""

import json
import socket
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.fake_server import CHAT, Rig
from tests.support.raw_http import exchange

HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
BODY = json.dumps({"model": CHAT, "prompt": "Hi", "max_tokens": 3}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
HIDDEN = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n"
"""What a request that is understood in two ways would carry past a proxy."""

SOUND = {
    "length": POST + LENGTH + b"\r\n" + BODY,
    "chunks": POST + CHUNKED + b"\r\n" + CHUNKS,
    "a chunk extension": POST + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1),
    "a trailer": POST + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"X-Sum: 5\r\n\r\n",
    "a tab in a header": POST + LENGTH + b"X-Tab: a\tb\r\n\r\n" + BODY,
    "bytes beyond ASCII in a header": POST + LENGTH + b"X-Name: \xc3\xa9\r\n\r\n" + BODY,
    "its own URL": POST.replace(b"/v1", b"http://LOCALHOST/v1") + LENGTH + b"\r\n" + BODY,
    "HTTP/1.0": POST.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + BODY,
}
MALFORMED = {
    "length and chunks": POST + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunks and length": POST + CHUNKED + b"Content-Length: 4\r\n\r\n" + CHUNKS,
    "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNKS,
    "two lengths": POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: 3, 4\r\n\r\n" + BODY,
    "a signed length": POST + LENGTH.replace(b": ", b": +") + b"\r\n" + BODY,
    "a coding behind chunked": POST + CHUNKED[:-2] + b", identity\r\n\r\n" + CHUNKS,
    "chunked twice": POST + CHUNKED + CHUNKED + b"\r\n" + CHUNKS,
    "chunked behind a control": POST + CHUNKED.replace(b": ", b": \x0b") + b"\r\n" + CHUNKS,
    "LF alone": (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "LF alone once": POST + b"X-A: b\n" + LENGTH + b"\r\n" + BODY,
    "LF alone at the end": POST + LENGTH + b"\n" + BODY,
    "LF alone before": b"\n" + POST + LENGTH + b"\r\n" + BODY,
    "LF alone in a head without an end": b"GET /v1/models HTTP/1.1\nHost: localhost\n\n",
    "LF alone in chunks": POST + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b"\n", 1),
    "LF alone in a trailer": POST + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"X-A: b\n\r\n",
    "a trailer of LF": POST + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"\n",
    "a continued header": POST + b"X-A: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY,
    "a continued length": POST + b"Content-Length:\r\n\t5\r\n\r\n" + BODY,
    "a space before the colon": POST + LENGTH.replace(b": ", b" : ") + b"\r\n" + BODY,
    "NUL": POST + b"X-A: b\0c\r\n" + LENGTH + b"\r\n" + BODY,
    "CR": POST + b"X-A: b\rc\r\n" + LENGTH + b"\r\n" + BODY,
    "a control": POST + b"X-A: b\x01c\r\n" + LENGTH + b"\r\n" + BODY,
    "DEL": POST + b"X-A: b\x7fc\r\n" + LENGTH + b"\r\n" + BODY,
    "a long chunk extension": POST + CHUNKED + b"\r\n5;" + b"x" * 300 + b"\r\n",
    "a chunk extension without end": POST + CHUNKED + b"\r\n5;" + b"x" * 300,
    "CR in a chunk extension": POST + CHUNKED + b"\r\n5;\rx\r\n" + BODY,
    "chunks that run on": POST + CHUNKED + b"\r\n2\r\n{}}\r\n0\r\n\r\n",
    "another host's URL": HIDDEN.replace(b"/v1", b"http://evil.example/v1"),
    "a URL with a user": HIDDEN.replace(b"/v1", b"http://a@localhost/v1"),
    "a broken URL": HIDDEN.replace(b"/v1", b"http://[::1/v1"),
    "another scheme": HIDDEN.replace(b"/v1", b"file://localhost/v1"),
    "a target without a slash": HIDDEN.replace(b"/v1", b"v1"),
    "a query alone": HIDDEN.replace(b"/v1/models", b"?a"),
    "a star": HIDDEN.replace(b"/v1/models", b"*"),
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "two hosts": HIDDEN.replace(HOST, HOST + b"Host: evil.example\r\n"),
    "no host": HIDDEN.replace(HOST, b""),
    "a host with a path": HIDDEN.replace(b"localhost", b"localhost/x"),
    "a host with a user": HIDDEN.replace(b"localhost", b"a@localhost"),
    "a host with a space": HIDDEN.replace(b"localhost", b"local host"),
    "a list of hosts": HIDDEN.replace(b"localhost", b"localhost localhost"),
    "a host in brackets that is none": HIDDEN.replace(b"localhost", b"[evil.example]"),
    "no request": b"nonsense\r\n\r\n",
    "another version": HIDDEN.replace(b"1.1", b"2.0"),
    "an old version": HIDDEN.replace(b"1.1", b"0.9"),
}


HOSTS = (
    *(".localhost", "localhost..", "a..localhost", "%6cocalhost", "[1]", "[::1", "[::1]x", "::1"),
    *("localhost:x", "localhost:80:80", "a,b", "a\\b", "a;b", "\xe9", "x" * 64, "x." * 127 + "y"),
)
MALFORMED |= {f"the host {host}": HIDDEN.replace(b"localhost", host.encode()) for host in HOSTS}


@pytest.mark.parametrize("name", SOUND)
def test_sound_requests_are_served(rig: Rig, name: str) -> None:
    last = HIDDEN.replace(HOST, HOST + b"Connection: close\r\n")
    received = exchange(rig.server.port, SOUND[name] + (b"" if b"1.0\r\n" in SOUND[name] else last))
    assert received.count(b"HTTP/1.1 200 ") == (1 if name == "HTTP/1.0" else 2), received


STATUSES = {
    "a coding behind chunked": b"501",
    "chunked twice": b"501",
    "another version": b"505",
    "an old version": b"505",
}
"""Those of malformed requests that are not 400."""


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused(rig: Rig, name: str) -> None:
    with capture_logs() as logs:
        received = exchange(rig.server.port, MALFORMED[name] + HIDDEN)
    assert received.count(b"HTTP/1.1 ") == 1, received
    head, _, body = received.partition(b"\r\n\r\n")
    assert head[9:12] == STATUSES.get(name, b"400"), received
    assert b"connection: close" in head.lower()
    error: dict[str, Any] = json.loads(body)["error"]
    assert error["code"] == "malformed_request"
    assert error["message"].startswith("The request is not valid HTTP/1.1: ")
    assert rig.engine.submitted == []
    assert "request_malformed" in [line["event"] for line in logs]


def test_a_refusal_repeats_nothing_of_the_request(rig: Rig) -> None:
    received = exchange(
        rig.server.port, HIDDEN.replace(HOST, HOST + b"Authorization Bearer secret\r\n")
    )
    assert received.startswith(b"HTTP/1.1 400")
    assert b"secret" not in received


def test_lines_may_come_in_parts_of_any_size(rig: Rig) -> None:
    """Each byte alone: the reader must not take half of a line's end for one that is bare."""
    sent = SOUND["a trailer"].replace(HOST, HOST + b"Connection: close\r\n")
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=30) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(sent)):
            raw.sendall(sent[i : i + 1])
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")
