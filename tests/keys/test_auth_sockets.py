"""How WebSockets bring their keys, and lose them."""

import gc
import socket
import time
import weakref
from contextlib import suppress
from typing import Any

import httpx
import orjson
import pytest
import websockets
from websockets.sync.client import connect

from server.http.frames import FrameMemory, Inbox, take_over
from server.keys.guard import MAX_TICKETS
from server.keys.key import TICKET_SECONDS, new_text
from tests.keys.admins import BODY, CHATS
from tests.support.fake_server import CHAT, REPLY
from tests.support.keyed_server import KeyRig, bearer, closing_code
from tests.support.waiting import until


def receive(ws: Any) -> list[Any]:
    frames = []
    while not frames or frames[-1]["object"] != "done":
        frames.append(orjson.loads(ws.recv(timeout=10)))
    return frames


@pytest.mark.parametrize("way", ["header", "protocol", "protocols", "ticket", "frame"])
def test_sockets_take_keys_in_four_ways(rig: KeyRig, way: str) -> None:
    text, url, options = rig.key()[1], rig.ws + CHATS, {}
    if way == "header":
        options = {"additional_headers": bearer(text)}
    elif way.startswith("protocol"):
        names = [f"inferneo.key.{text}", "inferneo"]
        options = {"subprotocols": names[:1] if way == "protocol" else names}
    elif way == "ticket":
        answer = rig.client.post("/v1/ws-tickets", headers=bearer(text))
        url += "?token=" + answer.json()["ticket"]
    with connect(url, **options) as ws:  # type: ignore[arg-type]
        if way == "protocols":
            assert ws.subprotocol == "inferneo"
        if way == "frame":
            ws.send(orjson.dumps({"type": "auth", "api_key": text}).decode())
        ws.send(orjson.dumps({**BODY, "stream": True}).decode())
        chunks = receive(ws)[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == REPLY
    if way == "ticket":
        with pytest.raises(websockets.InvalidStatus) as caught:
            connect(url)
        assert caught.value.response.status_code == 401


def test_a_first_frame_without_a_right_key_closes_the_socket(rig: KeyRig) -> None:
    unscoped = rig.key(scopes=frozenset({"embeddings"}))[1]
    for key, code in ((new_text("0000000000"), 4401), (unscoped, 4403), (None, 4401)):
        with connect(rig.ws + CHATS) as ws:
            ws.send(orjson.dumps({"type": "auth", "api_key": key}).decode())
            assert closing_code(ws) == code
    assert rig.engine.submitted == []


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "{}",
        "nonsense",
        "[" * 4000,
        '{"type": "auth", "api_key": NaN}',
        '{"type": "auth", "api_key": 5}',
        '{"type": "auth", "api_key": ["a"]}',
        '{"type": ["auth"], "api_key": "a"}',
        '{"type": "auth"}',
        '{"api_key": "a"}',
        '["auth"]',
        '"auth"',
        "null",
        orjson.dumps(BODY).decode(),
        b"",
        b"\xff\xfe",
        b"\x00" * 4096,
        '{"type": "auth", "api_key": "\\ud800"}',
        '{"type": "auth", "api_key": "inferneo-\u0661"}',
    ],
)
def test_a_first_frame_that_is_no_key_gets_an_error_and_4401(rig: KeyRig, frame: str) -> None:
    with connect(rig.ws + CHATS) as ws:
        ws.send(frame)
        assert orjson.loads(ws.recv(timeout=10))["error"]["code"] == "invalid_api_key"
        assert closing_code(ws) == 4401


def test_a_first_frame_that_is_too_long_closes_the_socket_at_once(rig: KeyRig) -> None:
    for parts in (["x" * 5000], ["x" * 4000, "x" * 97, "x"]):  # in fragments, too, and unfinished
        with connect(rig.ws + CHATS) as ws:
            with suppress(websockets.ConnectionClosed):  # it may be while the last part is sent
                ws.send(iter(parts))
            error = orjson.loads(ws.recv(timeout=10))["error"]
            assert "longer than 4096 bytes" in error["message"]
            assert closing_code(ws) == 1009


def test_an_identified_client_may_send_long_frames_at_once(rig: KeyRig) -> None:
    with connect(rig.ws + CHATS) as ws:
        ws.send(orjson.dumps({"type": "auth", "api_key": rig.key()[1]}).decode())
        ws.send(orjson.dumps({**BODY, "user": "x" * 200_000}).decode())
        assert "user" in orjson.loads(ws.recv(timeout=10))["error"]["message"]
        ws.send(orjson.dumps(BODY).decode())
        assert orjson.loads(ws.recv(timeout=10))["object"] == "chat.completion"


def test_a_silent_socket_is_closed(rig: KeyRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.keys.socket_auth.FIRST_FRAME_SECONDS", 0.05)
    with connect(rig.ws + CHATS) as ws:
        assert closing_code(ws) == 4401


def test_a_revoked_key_ends_an_open_socket_at_its_next_request(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys.lookup.FRESH_SECONDS", 0.0)
    key, text = rig.key()
    with connect(rig.ws + CHATS, additional_headers=bearer(text)) as ws:
        ws.send(orjson.dumps({**BODY, "stream": True}).decode())
        receive(ws)
        rig.change(key, revoked=time.time())
        ws.send(orjson.dumps(BODY).decode())
        assert orjson.loads(ws.recv(timeout=10))["error"]["type"] == "authentication_error"
        assert closing_code(ws) == 4401


def test_a_ticket_of_a_revoked_key_is_none(rig: KeyRig) -> None:
    key, text = rig.key()
    ticket = rig.client.post("/v1/ws-tickets", headers=bearer(text)).json()["ticket"]
    rig.change(key, revoked=time.time())
    with pytest.raises(websockets.InvalidStatus) as caught:
        connect(rig.ws + CHATS + "?token=" + ticket)
    assert caught.value.response.status_code == 401


def test_models_cannot_be_probed_over_a_socket(rig: KeyRig) -> None:
    headers = rig.headers(models=(CHAT,))
    with connect(rig.ws + CHATS, additional_headers=headers) as ws:
        ws.send(orjson.dumps({**BODY, "model": "secret"}).decode())
        assert orjson.loads(ws.recv(timeout=10))["error"]["code"] == "model_not_allowed"


def test_a_key_in_a_query_is_not_accepted(rig: KeyRig) -> None:
    text = rig.key()[1]
    for query in ("token", "api_key", "key"):
        response = httpx.get(f"{rig.url}/v1/models?{query}={text}")
        assert response.status_code == 401


def test_what_a_closed_socket_held_is_freed_without_the_collector(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def watched(send: Any, memory: FrameMemory) -> Inbox:
        inbox, stream = take_over(send, memory), send.__self__
        alive.update([inbox, stream, stream.send.__self__, stream.send.__self__.send.__self__])
        return inbox

    monkeypatch.setattr("server.http.socket_connection.take_over", watched)
    # The loop keeps a cancelled timer, and with it a context, until it would have been due.
    monkeypatch.setattr("server.keys.socket_auth.FIRST_FRAME_SECONDS", 1.0)
    url, text = rig.ws + CHATS, rig.key()[1]
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            for first in ("{}", "x" * 5000, b"\xff"):
                with connect(url) as ws:
                    ws.send(first)
                    closing_code(ws)
            with connect(url) as ws:
                ws.socket.sendall(b"\x81\xfe\x01\xf4" + bytes(9))  # a frame that does not go on
                ws.socket.shutdown(socket.SHUT_RDWR)
            with connect(url, additional_headers=bearer(text)) as ws:
                ws.send(orjson.dumps({**BODY, "stream": True}).decode())
                receive(ws)
                ws.send("nonsense")
                ws.recv(timeout=10)
            with pytest.raises(websockets.InvalidStatus):
                connect(url, additional_headers=bearer(new_text("0000000000")))
        assert alive
        until(lambda: not alive, 20, lambda: [*alive])
    finally:
        gc.enable()


def test_a_frame_that_stalls_closes_its_socket(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.frames.STALL_SECONDS", 0.1)
    with connect(rig.ws + CHATS, additional_headers=rig.headers()) as ws:
        ws.socket.sendall(b"\x81\xfe\x01\xf4" + bytes(4) + b"x" * 100)  # of 500
        assert orjson.loads(ws.recv(timeout=10))["error"]["code"] == "frame_stalled"
        assert closing_code(ws) == 1008


def test_a_key_has_a_bounded_number_of_unused_tickets(rig: KeyRig) -> None:
    def ask(headers: dict[str, str]) -> httpx.Response:
        return rig.client.post("/v1/ws-tickets", headers=headers)

    mine, others = rig.headers(), rig.headers()
    tickets = [ask(mine) for _ in range(MAX_TICKETS)]
    assert {answer.status_code for answer in tickets} == {200}
    refused = ask(mine)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_tickets"
    assert 0 < int(refused.headers["Retry-After"]) <= TICKET_SECONDS
    assert ask(others).status_code == 200
    with connect(f"{rig.ws}{CHATS}?token={tickets[0].json()['ticket']}"):
        assert ask(mine).status_code == 200


def test_what_has_not_a_tickets_form_is_not_looked_up(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys.store.sqlite.SqliteStore.take_ticket", None)
    for token in ("", "x" * 4000, "ticket-", "ticket-%ff", "ticket-" + "A" * 32):
        with pytest.raises(websockets.InvalidStatus) as caught:
            connect(f"{rig.ws}{CHATS}?token={token}")
        assert caught.value.response.status_code == 401
