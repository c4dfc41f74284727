"""No way of writing a request gets round the keys."""

import re
import socket
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import pytest

from server.api.endpoint import access_of
from server.app import create_app
from server.config.settings import Settings
from server.endpoints import ENDPOINTS
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import KeyRig
from tests.support.raw_http import exchange

ACCESS = access_of(ENDPOINTS)
PATHS = sorted(
    {
        re.sub(r"<path:model_id>", CHAT, re.sub(r"<(?!path)\w+>", "x", rule.rule))
        for rule in create_app(Settings()).url_map.iter_rules()
        if ACCESS[rule.endpoint] != "public"
    }
)
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
TARGETS = [
    "/v1/models",
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/v1/./models",
    "/v1%2Fmodels",
    "/v1/%6dodels",
    "/%76%31/models",
    "/V1/Models",
    "/health/../v1/models",
    "/health/%2e%2e/v1/models",
    "/health%2F..%2Fv1/models",
    "/health%00/../v1/models",
    "/health;/v1/models",
    "/%c0%af/v1/models",
    "/v1/models?x=/health",
    "/v1/models;/health",
    "/v1/models#/health",
    "/v1/models%20",
    "/v1/models%0d%0aX: y",
    "/HEALTH",
    "/health/",
    "/no/such/path",
    "/admin/keys",
    "/metrics",
    "http://localhost/v1/models",
    "http://localhost/health/../v1/models",
    "http://localhost:1@evil.example/v1/models",
    "http://evil.example/v1/models",
    "*",
]
HEADERS = [
    "X-Original-URL: /health",
    "X-Rewrite-URL: /health",
    "X-Forwarded-Prefix: /health",
    "X-Forwarded-Host: localhost",
    "X-Forwarded-For: 127.0.0.1",
    "Forwarded: for=127.0.0.1;host=localhost",
    "X-HTTP-Method-Override: OPTIONS",
    "X-Api-Key: anything",
    "Authorization:",
    "Proxy-Authorization: Bearer x",
    "Connection: keep-alive, Authorization",
    "Expect: 100-continue",
    "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nConnection: Upgrade",
    "Origin: http://localhost",
]


def ask(rig: KeyRig, head: str, *, leave: bool = True) -> bytes:
    """Everything that comes back, until the server has nothing more to say."""
    return exchange(rig.rig.server.port, head.encode(), leave=leave)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def refused(answer: bytes) -> bool:
    assert EMBED.encode() not in answer
    found = statuses(answer)
    return bool(found) and set(found) <= {100, 400, 401, 405, 426, 505}


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_and_no_host_gets_round_it(rig: KeyRig, target: str) -> None:
    for host in ("localhost", "127.0.0.1", "[::1]", "evil.example", "health", ""):
        assert refused(ask(rig, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")), host
    for head in (
        f"GET {target} HTTP/1.0\r\n\r\n",
        f"GET {target} HTTP/1.1\r\nHost: localhost\r\nHost: health\r\n\r\n",
        f"GET {target} HTTP/1.1\r\n\r\n",
        f"HEAD {target} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"TRACE {target} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        assert refused(ask(rig, head)), head


@pytest.mark.parametrize("header", HEADERS)
def test_no_header_gets_round_it(rig: KeyRig, header: str) -> None:
    for path in ("/v1/models", "/v1/usage", "/openapi.json"):
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n"
        assert refused(ask(rig, head)), path


@pytest.mark.parametrize("path", PATHS)
def test_no_upgrade_gets_round_it(rig: KeyRig, path: str) -> None:
    for protocol in ("", "Sec-WebSocket-Protocol: inferneo.key.inferneo-x-y\r\n"):
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}{protocol}\r\n"
        with socket.create_connection(("127.0.0.1", rig.rig.server.port), 10) as raw:
            raw.sendall(head.encode())
            answer = raw.recv(65536)
        (status,) = statuses(answer)
        # Where there are sockets, one without a key is opened and must name one first.
        sockets = ("/v1/completions", "/v1/chat/completions")
        assert status == (101 if path in sockets and not protocol else 401), answer
        assert EMBED.encode() not in answer


def test_a_key_counts_for_its_own_request_only(rig: KeyRig) -> None:
    key = rig.headers()["Authorization"]
    with_key = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n\r\n"
    without = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = without.replace("Host", "Connection: close\r\nHost")
    answer = ask(rig, with_key + without + with_key + last, leave=False)
    assert statuses(answer) == [200, 401, 200, 401]
    with socket.create_connection(("127.0.0.1", rig.rig.server.port), 10) as raw:
        for head, status in ((with_key, 200), (without, 401)) * 2:
            raw.sendall(head.encode())
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                answer += raw.recv(65536)
            assert statuses(answer) == [status]


def frames(rig: KeyRig, headers: dict[str, str]) -> Iterator[int]:
    """The status over HTTP/2, which a client may begin in."""
    http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http2.initiate_connection()
    http2.send_headers(1, list(headers.items()), end_stream=True)
    with socket.create_connection(("127.0.0.1", rig.rig.server.port), 10) as raw:
        raw.sendall(http2.data_to_send())
        while data := raw.recv(65536):
            for event in http2.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    yield int(dict(event.headers or ())[b":status"])
                    return


@pytest.mark.parametrize(
    "path", ["/v1/models", "//v1/models", "/health/../v1/models", "/openapi.json"]
)
@pytest.mark.parametrize("authority", ["localhost", "127.0.0.1", "evil.example"])
def test_http2_is_no_way_round(rig: KeyRig, path: str, authority: str) -> None:
    head = {":method": "GET", ":path": path, ":scheme": "http", ":authority": authority}
    assert list(frames(rig, head)) == [401]
    key = rig.headers()["Authorization"]
    good = head | {":path": "/v1/models", "authorization": key}
    assert list(frames(rig, good)) == [200]
