"""Whatever is sent, the answer is one short error, memory stays, and others are served."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import orjson
import pytest
from websockets.sync.client import connect

from tests.hostile.corpus import GOOD, SQUEEZED, fields, raw_bodies
from tests.hostile.loop import LagMeter
from tests.hostile.resident import resident
from tests.support.fake_server import CHAT, Rig
from tests.support.machine_speed import Machine
from tests.support.raw_http import exchange

pytestmark = pytest.mark.alone

JSON = {"Content-Type": "application/json"}
MIB = 2**20
ROUNDS = 5


def check(response: httpx.Response, name: str) -> None:
    """One envelope, with a sentence that a person can read."""
    assert 400 <= response.status_code < 500, (name, response.status_code, response.text[:500])
    check_envelope(response.json(), name)
    assert response.headers["X-Request-Id"]


def check_envelope(envelope: Any, name: str) -> None:
    error = envelope["error"]
    assert error.keys() == {"message", "type", "param", "code"}, name
    assert 10 < len(error["message"]) <= 500, (name, error["message"][:1000])
    assert len(error["param"] or "") <= 200, name
    for trace in ("Traceback", ".py", "site-packages", "object at 0x"):
        assert trace not in error["message"], name


def dumped(path: str, changes: dict[str, Any]) -> bytes:
    return json.dumps(GOOD[path] | changes).encode()


@pytest.mark.parametrize("path", GOOD)
def test_hostile_bodies_get_one_short_error(rig: Rig, path: str) -> None:
    for name, body in raw_bodies(path):
        check(rig.client.post(path, content=body, headers=JSON), name)
    for name, changes in fields(path):
        check(rig.client.post(path, content=dumped(path, changes), headers=JSON), name)
    compressed = JSON | {"Content-Encoding": "gzip"}
    check(rig.client.post(path, content=SQUEEZED, headers=compressed), "gzip")
    assert rig.post(path, GOOD[path]).status_code == 200


@pytest.mark.parametrize("path", GOOD)
def test_lone_surrogates_are_refused_in_every_text(rig: Rig, path: str) -> None:
    for field, value in GOOD[path].items():
        for place in (value, {"role": value}):
            body = json.dumps(GOOD[path] | {field: place})
            for text in ("Hi", CHAT, "user"):
                spoiled = body.replace(f'"{text}"', '"\\ud800"')
                if spoiled != body:
                    check(rig.client.post(path, content=spoiled, headers=JSON), spoiled)


@pytest.mark.parametrize("path", GOOD)
def test_of_equal_names_the_last_counts(rig: Rig, path: str) -> None:
    body = json.dumps(GOOD[path])
    twice = body[:-1] + ', "model": "org/none"}'
    assert rig.client.post(path, content=twice, headers=JSON).status_code == 404
    assert rig.client.post(path, content='{"model": 5, ' + body[1:], headers=JSON).is_success


def test_many_unknown_names_make_a_short_warning(rig: Rig) -> None:
    path = "/v1/completions"
    unknown = {f"name{i}" + "x" * 20: i for i in range(50_000)}
    response = rig.client.post(path, content=dumped(path, unknown), headers=JSON)
    assert response.status_code == 200
    assert len(response.content) < 10_000
    assert "49980 more" in response.json()["warnings"][-1]


def test_the_bodies_of_many_who_are_refused_are_not_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stays just below the bound for one body, and does not come to its end."""
    head = b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    before = resident()
    with ExitStack() as held:
        for _ in range(60):
            raw = held.enter_context(socket.create_connection(("127.0.0.1", rig.server.port), 10))
            raw.sendall(head + b"x" * 3_900_000)
        assert resident() - before < 60 * MIB
        assert rig.client.get("/health").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/nothing"])
def test_forty_megabytes_are_refused_and_not_kept(rig: Rig, path: str, chunked: bool) -> None:
    piece = b"x" * 2**16
    headers = JSON if chunked else JSON | {"Content-Length": str(40 * MIB)}
    before = resident()
    with httpx.Client(base_url=rig.url, timeout=30) as client:
        body = (piece for _ in range(40 * MIB // len(piece)))
        check(client.post(path, content=body, headers=headers), path)
    assert resident() - before < 30 * MIB


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 99999999999999999999",
        b"Content-Length: 9223372036854775808",
        b"Content-Length: -1",
        b"Content-Length: 1, 2",
        b"Content-Length: abc",
        b"X-Long: " + b"x" * 100_000,
        b"X-Bad\x00: y",
    ],
)
def test_absurd_heads_are_refused_at_once(
    rig: Rig, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.body.DRAIN_SECONDS", 0.1)
    start = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    received = exchange(rig.server.port, start + head + b"\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 4"), received


def test_a_body_without_an_end_is_answered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.body.DRAIN_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        ended = threading.Event()

        def write_on() -> None:
            for _ in range(4000):
                if ended.is_set():
                    return
                try:
                    raw.sendall(chunk)
                except OSError:
                    return

        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            assert raw.recv(65536).startswith(b"HTTP/1.1 413")
        finally:
            ended.set()
            writer.join(20)
    assert not writer.is_alive()


@pytest.mark.parametrize(
    "name",
    ["..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a%0d%0ab", "%2e%2e/", "x" * 8000, "//", "%25"],
)
def test_model_ids_in_paths_are_only_names(rig: Rig, name: str) -> None:
    head = f"GET /v1/models/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    received = exchange(rig.server.port, head.encode())
    assert received.startswith(b"HTTP/1.1 404"), received
    assert len(received) < 2000


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_hostile_frames_get_one_short_error_and_the_socket_lives(rig: Rig, path: str) -> None:
    with connect(rig.ws + path, max_size=None) as ws:
        for name, body in raw_bodies(path):
            ws.send(body)
            check_envelope(orjson.loads(ws.recv(10)), name)
        for name, changes in fields(path):
            ws.send(dumped(path, changes).decode())
            check_envelope(orjson.loads(ws.recv(10)), name)
        for envelope in (
            {"type": [[[]]]},
            {"type": "x" * 10**6},
            {"type": "request", "id": "x" * 10**6, "body": {}},
            {"type": "request", "id": 5, "body": {}},
            {"type": "request", "id": "a", "body": []},
            {"type": "cancel", "id": "none"},
        ):
            ws.send(orjson.dumps(envelope).decode())
            check_envelope(orjson.loads(ws.recv(10)), str(envelope)[:80])
        ws.send(orjson.dumps(GOOD[path]).decode())
        assert "choices" in orjson.loads(ws.recv(10))


def test_a_frame_of_forty_megabytes_is_refused_and_not_kept(rig: Rig) -> None:
    with connect(rig.ws + "/v1/completions") as ws:
        assert ws.protocol.extensions == []  # no compression, so nothing inflates
        piece = "x" * MIB
        before = resident()
        ws.send(piece for _ in range(40))
        check_envelope(orjson.loads(ws.recv(30)), "40 MB")
        assert resident() - before < 40 * MIB
        ws.send(orjson.dumps(GOOD["/v1/completions"]).decode())
        assert "choices" in orjson.loads(ws.recv(10))


def test_others_are_served_meanwhile_and_memory_stays(rig: Rig, machine: Machine) -> None:
    """Each bound must hold in one of a few rounds: noise only adds, and a leak is in every one."""
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    bodies = [
        (path, body)
        for path in paths
        for body in [
            *(body for _, body in raw_bodies(path)),
            *(dumped(path, changes) for _, changes in fields(path)),
        ]
    ]
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(_measure(rig, bodies))
        grown, lag, wait = (min(figures) for figures in zip(*rounds, strict=True))
        print(f"{rounds[-1]} of {len(bodies)} bodies")
        if grown < 32 * MIB and lag < machine.seconds(0.1) and wait < machine.seconds(0.2):
            return
    pytest.fail(f"at best {grown / MIB:.1f} MiB kept, lag {lag:.3f} s, /health after {wait:.3f} s")


def _measure(rig: Rig, bodies: list[tuple[str, bytes]]) -> tuple[float, float, float]:
    """Send every body: bytes kept of them, and p99 of the loop's lag and of another's wait."""
    waits: list[float] = []
    ended = threading.Event()

    def knock() -> None:
        with httpx.Client(base_url=rig.url) as client:
            while not ended.is_set():
                begun = time.perf_counter()
                client.get("/health")
                waits.append(time.perf_counter() - begun)
                ended.wait(0.005)

    before = resident()
    knocker = threading.Thread(target=knock)
    with LagMeter(rig.server.loop) as meter:
        knocker.start()
        for path, body in bodies:
            rig.client.post(path, content=body, headers=JSON)
        ended.set()
        knocker.join()
    return resident() - before, meter.at(0.99), sorted(waits)[int(0.99 * len(waits))]
