"""HTTP/2 frame by frame: malformed requests are refused, and nothing is held by those who do it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson
import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame, RstStreamFrame

from inferneo_jax import Tokenizer
from server.http.http2 import MAX_RESETS
from tests.hostile.frames import Frames, Header
from tests.support.fake_server import CHAT, Rig, running

PROTOCOL_ERROR, CANCEL, ENHANCE_YOUR_CALM = 1, 8, 11
GET: dict[str, str | bytes] = {
    ":method": "GET",
    ":scheme": "http",
    ":authority": "localhost",
    ":path": "/v1/models",
}
BODY = orjson.dumps({"model": CHAT, "prompt": "Hi", "max_tokens": 3})
POST: list[Header] = [
    *(GET | {":method": "POST", ":path": "/v1/completions"}).items(),
    ("content-type", "application/json"),
]


def changed(**pseudo: str | bytes) -> list[Header]:
    return list((GET | {f":{name}": value for name, value in pseudo.items()}).items())


def without(name: str, *more: Header) -> list[Header]:
    return [*(item for item in GET.items() if item[0] != name), *more]


def more(*headers: Header) -> list[Header]:
    return [*GET.items(), *headers]


MALFORMED: dict[str, list[Header]] = {
    "two methods": more((":method", "GET")),
    "two paths": [(":path", "/health"), *GET.items()],
    "two authorities": more((":authority", "evil.example")),
    "an unknown pseudo-header": more((":evil", "x")),
    "that of a response": more((":status", "200")),
    "one behind a header": [*list(GET.items())[:3], ("x-a", "b"), (":path", "/v1/models")],
    "no path": without(":path"),
    "no method": without(":method"),
    "no scheme": without(":scheme"),
    "no host at all": without(":authority"),
    "two hosts": without(":authority", ("host", "evil.example"), ("host", "localhost")),
    "another host": more(("host", "evil.example")),
    "another authority": [*changed(authority="evil.example"), ("host", "localhost")],
    "a user in the authority": changed(authority="a@localhost"),
    "an empty label": changed(authority="a..b"),
    "bytes in the authority": changed(authority=b"\xff\xfe"),
    "NUL in the authority": changed(authority="localhost\0"),
    "a path in the host": without(":authority", ("host", "localhost/x")),
    "an empty path": changed(path=""),
    "a path without a slash": changed(path="v1/models"),
    "CR LF in the path": changed(path="/v1/models\r\nX: y"),
    "NUL in the path": changed(path="/v1/\0models"),
    "a space in the path": changed(path="/v1/ models"),
    "bytes in the path": changed(path=b"/v1/\xc3\xa9"),
    "a star": changed(path="*"),
    "a URL": changed(path="http://evil.example/v1/models"),
    "a query alone": changed(path="?a"),
    "another scheme": changed(scheme="ftp"),
    "an empty scheme": changed(scheme=""),
    "CR LF in the scheme": changed(scheme="http\r\n"),
    "an empty method": changed(method=""),
    "a space in the method": changed(method="GE T"),
    "CR LF in the method": changed(method="GET\r\nX"),
    "bytes in the method": changed(method=b"G\xc3\x89T"),
    "CONNECT": [(":method", "CONNECT"), (":authority", "localhost:80")],
    "CONNECT of another protocol": [*changed(method="CONNECT"), (":protocol", "tcp")],
    "a protocol with GET": more((":protocol", "websocket")),
    "an upper-case name": more(("X-Upper", "a")),
    "an empty name": more(("", "a")),
    "a name with a space": more(("a b", "c")),
    "a name with a colon": more(("a:b", "c")),
    "CR LF in a value": more(("x-a", "b\r\nc: d")),
    "NUL in a value": more(("x-a", "b\0c")),
    "connection": more(("connection", "close")),
    "keep-alive": more(("keep-alive", "5")),
    "upgrade": more(("upgrade", "h2c")),
    "transfer-encoding": more(("transfer-encoding", "chunked")),
    "te": more(("te", "gzip")),
    "a length without a body": more(("content-length", "5")),
    "two lengths": more(("content-length", "0"), ("content-length", "5")),
    "a length that is none": more(("content-length", "x")),
    "a negative length": more(("content-length", "-1")),
}
STATUSES: dict[str, tuple[list[Header], int]] = {
    "sound": (list(GET.items()), 200),
    "te: trailers": (more(("te", "trailers")), 200),
    "https behind a proxy": (changed(scheme="https"), 200),
    "host in place of the authority": (without(":authority", ("host", "localhost")), 200),
    "host beside the same authority": (more(("host", "localhost")), 200),
    "another host alone": (without(":authority", ("host", "evil.example")), 403),
    "another authority alone": (changed(authority="evil.example"), 403),
    "an empty authority": (changed(authority=""), 403),
    "what a proxy marked": (more(("x-forwarded-for", "192.0.2.1")), 403),
    "options of all": (changed(method="OPTIONS", path="*"), 404),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused(rig: Rig, name: str) -> None:
    """By the end of the stream, or of the connection where h2 sees it; never by an answer."""
    with Frames(rig.server.port) as client:
        client.send(client.headers(1, MALFORMED[name], "END_STREAM"))
        client.wait(1)
        assert client.status == {}
        assert PROTOCOL_ERROR in (client.gone, client.reset.get(1))
        if not client.closed:
            client.send(client.headers(3, GET.items(), "END_STREAM"))
            client.wait(3)
            assert client.status == {3: 200}


@pytest.mark.parametrize("name", STATUSES)
def test_the_authority_is_what_counts(rig: Rig, name: str) -> None:
    headers, status = STATUSES[name]
    with Frames(rig.server.port) as client:
        client.send(client.headers(1, headers, "END_STREAM"))
        client.wait(1)
        assert client.status == {1: status}, client.data


def test_the_authority_is_compared_with_the_hosts_that_are_listed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hosts, location = ("api.example",), str(tmp_path / "keys.db")
    with (
        running(tokenizer, require_key="false", allowed_hosts=hosts, keys_db=location) as rig,
        Frames(rig.server.port) as client,
    ):
        for stream, authority, status in ((1, "api.example", 200), (3, "localhost", 403)):
            client.send(client.headers(stream, changed(authority=authority), "END_STREAM"))
            client.wait(stream)
            assert client.status[stream] == status


@pytest.mark.parametrize("difference", [-3, 3])
def test_a_length_that_the_body_has_not_is_refused(rig: Rig, difference: int) -> None:
    length = ("content-length", str(len(BODY) + difference))
    with Frames(rig.server.port) as client:
        client.send(client.headers(1, [*POST, length]), client.body(1, BODY, "END_STREAM"))
        client.wait(1)
        assert client.status == {}
        assert client.gone == PROTOCOL_ERROR
    assert rig.engine.submitted == []


@pytest.mark.alone
def test_a_body_that_stalls_ends_its_stream_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What still comes of it is dropped, and the window of the connection stays open."""
    monkeypatch.setattr("server.http.body.STALL_SECONDS", 0.5)
    with Frames(rig.server.port) as client:
        client.send(client.headers(1, POST), client.body(1, BODY[:5]))
        client.wait(1)
        assert client.status == {1: 408}
        assert orjson.loads(client.data[1])["error"]["code"] == "body_stalled"
        for _ in range(20):  # more than the connection's window of 64 KiB, unless it is given back
            client.send(client.body(1, b"x" * 3000))
            client.pinged()
        for stream in range(3, 43, 2):
            client.send(client.headers(stream, POST), client.body(stream, b" " * 3000))
            client.send(client.body(stream, BODY, "END_STREAM"))
            client.wait(stream)
            assert client.status[stream] == 200


@pytest.fixture(scope="module")
def hasty(tokenizer: Tokenizer) -> Iterator[Rig]:
    """A server that waits for requests for half a second only."""
    with running(tokenizer) as rig:
        rig.server.config.keep_alive_timeout = 0.5
        yield rig


@pytest.mark.alone
def test_connections_without_a_request_are_closed(hasty: Rig) -> None:
    """With HTTP/2's preface and nothing else, with half of a head, and after a refused request."""
    with Frames(hasty.server.port) as silent:
        silent.wait_closed()
    with Frames(hasty.server.port) as half:
        frame = half.headers(1, GET.items(), "END_STREAM")
        frame.flags.discard("END_HEADERS")
        half.send(frame)
        half.wait_closed()
        assert half.status == {}
    with Frames(hasty.server.port) as refused:
        refused.send(refused.headers(1, changed(path="?"), "END_STREAM"))
        refused.wait_closed()
        assert refused.reset == {1: PROTOCOL_ERROR}
    with Frames(hasty.server.port) as served:
        served.send(served.headers(1, GET.items(), "END_STREAM"))
        served.wait_closed()
        assert served.status == {1: 200}


def test_a_head_that_never_ends_is_refused(rig: Rig) -> None:
    with Frames(rig.server.port) as client:
        frame = HeadersFrame(1)
        frame.data = client.headers(1, GET.items()).data
        client.send(frame)
        part = ContinuationFrame(1)
        part.data = b"\0\1a\1b" * 1000
        for _ in range(100):
            try:
                client.send(part)
            except OSError:
                break
        client.wait_closed()
        assert client.status == {}


def test_headers_and_streams_are_bounded(rig: Rig) -> None:
    with Frames(rig.server.port) as large:
        bomb = large.headers(1, more(*((f"x-{i}", "y" * 500) for i in range(30))), "END_STREAM")
        repeated = bytes([0x80 | 62]) * 15_000  # the last of them, out of the table, 7 MB in all
        bomb.data += repeated[: 16_384 - len(bomb.data)]
        large.send(bomb)
        large.wait_closed()
        assert large.status == {}
    with Frames(rig.server.port) as many:
        for stream in range(1, 2 * 100 + 3, 2):
            many.send(many.headers(stream, POST))
        many.wait_closed()
        assert many.gone is not None
    assert rig.client.get("/health").status_code == 200


@contextmanager
def most_tasks(rig: Rig) -> Iterator[list[int]]:
    """How many tasks the server's event loop has at most, above those it has now."""
    most = [0]

    async def look() -> None:
        usual = len(asyncio.all_tasks())
        while True:
            most[0] = max(most[0], len(asyncio.all_tasks()) - usual)
            await asyncio.sleep(0)

    future = asyncio.run_coroutine_threadsafe(look(), rig.server.loop)
    try:
        yield most
    finally:
        future.cancel()


@pytest.mark.parametrize("headers", [list(GET.items()), POST], ids=["GET", "POST"])
def test_streams_that_are_reset_at_once_start_few_requests(rig: Rig, headers: list[Header]) -> None:
    with Frames(rig.server.port) as client, most_tasks(rig) as most:
        flood = b"".join(
            client.headers(stream, headers, *["END_STREAM"][: headers != POST]).serialize()
            + RstStreamFrame(stream, CANCEL).serialize()
            for stream in range(1, 1999, 2)
        )
        with suppress(OSError):
            client.raw.sendall(flood)
        client.wait_closed()
    assert most[0] < 100, most
    assert client.gone in (ENHANCE_YOUR_CALM, None)  # None: the connection was reset behind it
    assert rig.client.get("/health").status_code == 200


def test_streams_may_be_given_up_now_and_then(rig: Rig) -> None:
    with Frames(rig.server.port) as client:
        for stream in range(1, 2 * MAX_RESETS - 1, 2):
            client.send(client.headers(stream, POST), RstStreamFrame(stream, CANCEL))
        stream = 2 * MAX_RESETS + 1
        client.send(client.headers(stream, GET.items(), "END_STREAM"))
        client.wait(stream)
        assert client.status[stream] == 200
