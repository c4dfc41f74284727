"""Bodies that never come, or too slowly, hold no places for long; honest slow ones are served."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inferneo_jax import Tokenizer
from server import application
from server.keys.key import Limits
from server.run.permits import Permits
from tests.support.fake_server import CHAT
from tests.support.keyed_server import KeyRig, bearer, key_rig
from tests.support.raw_http import post
from tests.support.waiting import until

pytestmark = pytest.mark.alone

PATH = "/v1/completions"
BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": 10}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Permits]:
    """The permits of the servers that are started."""
    found: list[Permits] = []

    def make(*args: Any) -> Permits:
        found.append(Permits(*args))
        return found[-1]

    monkeypatch.setattr(application, "Permits", make)
    return found


@pytest.fixture
def rig(tokenizer: Tokenizer, tmp_path: Path, made: list[Permits]) -> Iterator[KeyRig]:
    with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="true") as found:
        yield found


def head(length: int, key: dict[str, str], *more: str) -> bytes:
    """Of a request whose body does not follow at once."""
    return post(
        PATH, None, *(f"{name}: {value}" for name, value in key.items()), *more, length=length
    )


def answer(raw: socket.socket) -> tuple[int, bytes]:
    """Status and the rest, read until the server closes the connection."""
    received = b""
    while part := raw.recv(65536):
        received += part
    return int(received.split(b" ", 2)[1]), received


def opened(rig: KeyRig, held: ExitStack, sent: bytes) -> socket.socket:
    raw = held.enter_context(socket.create_connection(("127.0.0.1", rig.rig.server.port), 30))
    raw.sendall(sent)
    return raw


def test_idle_bodies_hold_no_more_places_than_their_key_has_requests(
    rig: KeyRig, made: list[Permits]
) -> None:
    flood, other = rig.headers(Limits(requests=20)), rig.headers()
    permits, most = made[0], 0
    assert rig.client.get("/v1/models", headers=flood).status_code == 200  # the key is known now
    with ExitStack() as held:
        raws = [opened(rig, held, head(100, flood) + b"{") for _ in range(200)]
        refused = 0
        for raw in raws:
            raw.settimeout(0.0)
        end = time.monotonic() + 20
        while refused < 180:  # the others are let in, and wait for their bodies
            assert time.monotonic() < end, (refused, most)
            most = max(most, permits.in_use)
            assert rig.client.post(PATH, headers=other, json=BODY).status_code == 200
            refused = sum(_has_answer(raw) for raw in raws)
        statuses = []
        for raw in raws:
            raw.settimeout(30)
            status, received = answer(raw)
            statuses.append(status)
            # 503: keys are looked up for a bounded number of requests at once.
            assert status in (408, 429, 503), received
            if status == 408:
                error = orjson.loads(received.partition(b"\r\n\r\n")[2])["error"]
                assert error["code"] == "body_stalled"
                assert "1024 bytes a second" in error["message"]
                assert b"connection: close" in received.lower()
        assert statuses.count(408) == 20
    assert most <= 20 + 5  # and those of the other key, the last of which may still be ending
    _wait(permits, 0)
    again = rig.client.post(PATH, headers=flood, json=BODY)
    assert again.status_code == 429
    assert rig.client.post(PATH, headers=other, json=BODY).status_code == 200


def _has_answer(raw: socket.socket) -> bool:
    try:
        return bool(raw.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_bodies_under_way_count_as_requests_at_once(rig: KeyRig, made: list[Permits]) -> None:
    key = rig.headers(Limits(requests=None, tokens=None, day_requests=None, concurrent=2))
    content = orjson.dumps(BODY)
    with ExitStack() as held:
        waiting = [opened(rig, held, head(len(content), key, "Connection: close")) for _ in "ab"]
        until(lambda: made[0].in_use >= 2, 10)
        refused = httpx.post(rig.url + PATH, headers=key, json=BODY)
        assert refused.status_code == 429
        assert "2 requests at once" in refused.json()["error"]["message"]
        assert refused.headers["Retry-After"] == "1"
        for raw in waiting:
            raw.sendall(content)
            assert answer(raw)[0] == 200
    assert httpx.post(rig.url + PATH, headers=key, json=BODY).status_code == 200


def test_a_trickle_is_ended_and_a_poor_line_is_served(
    rig: KeyRig, made: list[Permits], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sends a byte now and then for as long as it may; one keeps just above the pace."""
    monkeypatch.setattr("server.http.body.STALL_SECONDS", 1.0)
    key = rig.headers()
    ended = threading.Event()
    with ExitStack() as held:
        trickle = opened(rig, held, head(10_000, key))

        def drip() -> None:
            with suppress(OSError):  # the server closes it
                while not ended.wait(0.1):
                    trickle.sendall(b"{")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert answer(trickle)[0] == 408
        finally:
            ended.set()
            dripping.join()

        content = orjson.dumps(BODY | {"prompt": "x" * 200}).ljust(8 * 1024)
        honest = opened(rig, held, head(len(content), key, "Connection: close"))
        for at in range(0, len(content), 512):  # 2.5 KiB a second, for 3.2 s
            time.sleep(0.2)
            honest.sendall(content[at : at + 512])
        assert answer(honest)[0] == 200
    _wait(made[0], 0)


def test_a_body_is_waited_for_until_the_requests_deadline_only(rig: KeyRig) -> None:
    with ExitStack() as held:
        raw = opened(rig, held, head(100, rig.headers(), "X-Request-Timeout: 0.2"))
        status, received = answer(raw)
    assert status == 504
    assert b"deadline_exceeded" in received


def test_a_client_that_leaves_its_body_unsent_has_made_a_request(
    rig: KeyRig, made: list[Permits]
) -> None:
    text = rig.key(Limits(requests=2))[1]
    for _ in range(2):
        with ExitStack() as held:
            opened(rig, held, head(100, bearer(text)))
            _wait(made[0], 1)
        _wait(made[0], 0)
    assert rig.client.post(PATH, headers=bearer(text), json=BODY).status_code == 429


def _wait(permits: Permits, taken: int) -> None:
    until(lambda: permits.in_use == taken, 10)
