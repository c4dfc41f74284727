"""How WebSockets bring their keys, and lose them."""

import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import websockets
from harness import CHAT, REPLY
from rigs import KeyRig, bearer, closing_code
from websockets.sync.client import connect

from server.access.keys import new_text

ROOT = Path(__file__).parents[2]
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": CHAT, "prompt": "Hi", "max_tokens": 400}


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
    for frame in ("{}", "nonsense", orjson.dumps(BODY).decode(), b"\xff", "x" * 5000):
        with connect(rig.ws + CHATS) as ws:
            ws.send(frame)
            assert closing_code(ws) in (4401, 1011)
    assert rig.engine.submitted == []


def test_a_silent_socket_is_closed(rig: KeyRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.access.socket_auth.FIRST_FRAME_SECONDS", 0.05)
    with connect(rig.ws + CHATS) as ws:
        assert closing_code(ws) == 4401


def test_a_revoked_key_ends_an_open_socket_at_its_next_request(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.access.lookup.FRESH_SECONDS", 0.0)
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
