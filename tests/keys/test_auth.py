"""Every route refuses whom it must, however it is asked."""

import io
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import websockets
from harness import CHAT, EMBED, REPLY
from rigs import KeyRig, bearer, key_rig
from websockets.sync.client import ClientConnection, connect

from inferneo_jax import Tokenizer
from server import log
from server.app import create_app
from server.auth import OPEN_ENDPOINTS, SCOPE_OF
from server.keys import digest, new_text
from server.settings import Settings

ROOT = Path(__file__).parents[2]
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": CHAT, "prompt": "Hi", "max_tokens": 400}
RULES = [
    (rule.rule, method)
    for rule in create_app(Settings()).url_map.iter_rules()
    if rule.endpoint not in OPEN_ENDPOINTS
    for method in (["WEBSOCKET"] if rule.websocket else sorted(rule.methods or ()))
]


def closing_code(ws: ClientConnection) -> int:
    """What an open socket is closed with."""
    with suppress(websockets.ConnectionClosed):
        while True:
            ws.recv(timeout=10)
    assert ws.close_code is not None
    return ws.close_code


def status_of(rig: KeyRig, method: str, path: str, headers: dict[str, str]) -> int:
    if method != "WEBSOCKET":
        response = rig.client.request(method, path, headers=headers, json={})
        if method != "HEAD":
            error = response.json().get("error") if response.status_code >= 400 else None
            assert error is None or set(error) == {"message", "type", "param", "code"}
        if response.status_code == 401:
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["X-Request-Id"]
        return response.status_code
    try:
        options = {name: value for name, value in headers.items() if name != "Host"}
        with connect(rig.ws + path, additional_headers=options) as ws:
            ws.send("{}")
            assert b"error" in ws.recv(timeout=10, decode=False)
            if headers.get("Authorization"):
                return 101
            return closing_code(ws)
    except websockets.InvalidStatus as refused:
        return refused.response.status_code


def credentials(rig: KeyRig) -> dict[str, dict[str, str]]:
    """Headers that no route may accept."""
    key, text = rig.key(scopes=frozenset({"inference", "embeddings", "metrics", "admin"}))
    revoked, revoked_text = rig.key()
    rig.change(revoked, revoked=time.time())
    return {
        "none": {},
        "empty": {"Authorization": ""},
        "not bearer": {"Authorization": f"Basic {text}"},
        "no token": {"Authorization": "Bearer"},
        "wrong": bearer(text[:-1] + ("a" if text[-1] != "a" else "b")),
        "unknown": bearer(new_text("0000000000")),
        "no key": bearer("sk-something"),
        "longer": bearer(text + "x"),
        "the digest": bearer(key.digest),
        "expired": bearer(rig.key(expires=time.time() - 1)[1]),
        "revoked": bearer(revoked_text),
        "another header": {"X-Api-Key": text, "Api-Key": text},
        "a cookie": {"Cookie": f"Authorization={text}"},
        "a local address": {"X-Forwarded-For": "127.0.0.1", "Host": "localhost"},
    }


def test_every_route_is_listed_with_its_scope() -> None:
    assert {rule for rule, _ in RULES} <= SCOPE_OF.keys()


@pytest.mark.parametrize(("rule", "method"), RULES)
def test_every_route_refuses_without_a_key_that_counts(rig: KeyRig, rule: str, method: str) -> None:
    path = rule.replace("<path:model_id>", CHAT).replace("<file>", "index.html")
    for name, headers in credentials(rig).items():
        assert status_of(rig, method, path, headers) in (401, 4401), name
    if (scope := SCOPE_OF[rule]) is not None:
        others = frozenset({"inference", "embeddings", "metrics", "admin"} - {scope})
        assert status_of(rig, method, path, rig.headers(scopes=others)) == 403
    good = status_of(rig, method, path, rig.headers(scopes=frozenset(filter(None, [scope]))))
    assert good not in (401, 403, 4401, 4403)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(rig: KeyRig, path: str) -> None:
    assert rig.client.get(path, headers={"Host": "any.example"}).status_code == 200


def test_two_authorization_headers_are_none(rig: KeyRig) -> None:
    text = rig.key()[1]
    twice = [("Authorization", f"Bearer {text}")] * 2
    assert rig.client.get("/v1/models", headers=twice).status_code == 401


def test_a_key_may_use_its_models_only(rig: KeyRig) -> None:
    headers = rig.headers(models=("gpt-4o",))
    assert [m["id"] for m in rig.client.get("/v1/models", headers=headers).json()["data"]] == [CHAT]
    for name in (CHAT, "gpt-4o"):
        ok = rig.client.post(CHATS, headers=headers, json={**BODY, "model": name})
        assert ok.status_code == 200
    refused = [
        rig.client.get(f"/v1/models/{EMBED}", headers=headers),
        rig.client.get("/v1/models/unknown", headers=headers),
        rig.client.post("/v1/embeddings", headers=headers, json={"model": "ada", "input": "x"}),
        rig.client.post("/tokenize", headers=headers, json={"model": EMBED, "prompt": "x"}),
        rig.client.post(CHATS, headers=headers, json={**BODY, "model": "unknown"}),
    ]
    for response in refused:
        assert response.status_code == 403
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("permission_error", "model_not_allowed")


def test_revocation_rotation_and_expiry_take_effect_within_two_seconds(rig: KeyRig) -> None:
    def status(text: str) -> int:
        return rig.client.get("/v1/models", headers=bearer(text)).status_code

    def until(text: str, wanted: int) -> None:
        end = time.monotonic() + 2
        while status(text) != wanted:
            assert time.monotonic() < end

    key, text = rig.key()
    assert status(text) == 200
    new = new_text(key.id)
    rig.change(key, digest=digest(rig.store.pepper(), new))
    assert status(new) == 200  # at once, though the old one may have been looked up just now
    until(text, 401)
    rig.change(key, revoked=time.time())
    until(new, 401)
    brief = rig.key(expires=time.time() + 0.5)[1]
    assert status(brief) == 200
    until(brief, 401)


def test_no_key_is_repeated_anywhere(rig: KeyRig, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    log.configure("json")
    _, text = rig.key()
    secret = text.rpartition("-")[2]
    bad = text[:-4] + "AAAA"
    answers = [
        rig.client.post(CHATS, headers=bearer(text), json=BODY),
        rig.client.post(CHATS, headers=bearer(bad), json=BODY),
        rig.client.post(CHATS, headers=bearer(text), json={}),
        rig.client.get("/v1/usage", headers=bearer(text)),
        rig.client.get("/v1/usage", headers={"Authorization": text}),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 400, 200, 401]
    shown = "".join(answer.text + str(answer.headers) for answer in answers)
    with pytest.raises(websockets.InvalidStatus) as caught:
        connect(rig.ws + CHATS + "?token=" + text)
    shown += str(caught.value.response.headers) + str(caught.value.response.body)
    monkeypatch.undo()
    log.configure("json")
    logged = written.getvalue()
    # By another process: to close the file in this one would end the locks of its connections.
    files = list(Path(rig.location).parent.iterdir())
    kept = subprocess.run(["cat", *files], capture_output=True, check=True).stdout
    assert digest(rig.store.pepper(), text).encode() in kept
    assert text.split("-")[1] in logged  # its id is there
    for hidden in (secret, bad.rpartition("-")[2]):
        assert hidden not in shown
        assert hidden not in logged
        assert hidden.encode() not in kept


def test_two_keys_never_share_cached_prompts(rig: KeyRig) -> None:
    ours, theirs = rig.headers(), rig.headers()
    for headers in (ours, theirs, ours):
        for salt in ("", "x"):
            body = {**COMPLETION, "cache_salt": salt}
            assert rig.client.post("/v1/completions", headers=headers, json=body).is_success
    salts = [request.cache_salt for request in rig.engine.submitted]
    assert salts[:2] == salts[4:]
    assert len(set(salts)) == 4


@pytest.fixture
def keyless(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    with key_rig(tokenizer, str(tmp_path / "keys.db")) as found:
        yield found


def test_without_keys_only_this_machine_is_served(keyless: KeyRig) -> None:
    def status(**headers: str) -> int:
        return keyless.client.get("/v1/models", headers=headers).status_code

    assert status() == status(Host="localhost:1") == status(Host="[::1]:1") == 200
    assert status(Authorization="Bearer unused") == 200
    for headers in (
        {"Host": "rebound.example"},
        {"Host": "localhost.evil.example:80"},
        {"X-Forwarded-For": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
    ):
        response = keyless.client.get("/v1/models", headers=headers)
        assert response.status_code == 403
        assert "inferneo keys create" in response.json()["error"]["message"]
    assert not Path(keyless.location).exists()
    assert keyless.client.get("/v1/usage").status_code == 400


def test_the_first_key_closes_the_server_at_once(keyless: KeyRig) -> None:
    assert keyless.client.get("/v1/models").status_code == 200
    headers = keyless.headers()
    assert keyless.client.get("/v1/models").status_code == 401
    assert keyless.client.get("/v1/models", headers=headers).status_code == 200
    Path(keyless.location).unlink()
    assert keyless.client.get("/v1/models").status_code == 401


async def test_an_address_of_another_network_is_not_served_without_keys(tmp_path: Path) -> None:
    app = create_app(Settings(keys_db=str(tmp_path / "keys.db")))
    for server, status in (
        (("192.0.2.1", 80), 403),
        (("::ffff:127.0.0.1", 80), 503),
        (("/run/socket", None), 503),
        (("2001:db8::1", 80), 403),
        (("127.0.0.2", 80), 503),
    ):
        client = app.test_client()
        response = await client.get(
            "/v1/models", headers={"Host": "localhost"}, scope_base={"server": server}
        )
        assert response.status_code == status, server


def test_a_server_that_requires_no_key_asks_for_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="false") as rig:
        rig.key()
        response = rig.client.get("/v1/models", headers={"Host": "any.example"})
        assert response.status_code == 200
        assert "X-RateLimit-Limit" not in response.headers


@pytest.mark.parametrize("require", ["true", "false"])
def test_only_the_hosts_that_are_listed_are_answered_for(
    tokenizer: Tokenizer, tmp_path: Path, require: str
) -> None:
    hosts = ("api.example", "localhost")
    location = str(tmp_path / "keys.db")
    with key_rig(tokenizer, location, require_key=require, allowed_hosts=hosts) as rig:
        headers = rig.headers()
        for host, status in (
            ("api.example", 200),
            ("API.example:8000", 200),
            ("localhost:1", 200),
            ("rebound.example", 403),
            ("api.example.evil", 403),
            ("127.0.0.1", 403),
        ):
            answer = rig.client.get("/v1/models", headers=headers | {"Host": host})
            assert answer.status_code == status, host
            assert rig.client.get("/health", headers={"Host": host}).status_code == 200
        with pytest.raises(websockets.InvalidStatus):
            connect(rig.ws + CHATS, additional_headers=headers)  # at 127.0.0.1


def test_a_store_that_fails_closes_the_server(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    path.write_bytes(b"no database" * 1000)
    with key_rig(tokenizer, str(path)) as rig:
        for headers in ({}, bearer(new_text("0000000000"))):
            response = rig.client.get("/v1/models", headers=headers)
            assert response.status_code == 503
            assert response.headers["Retry-After"]
            assert str(tmp_path) not in response.text
        assert rig.client.get("/health").status_code == 200


def cli(*arguments: str, db: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "server.cli", "keys", *arguments, "--db", db]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_commands_make_change_and_end_keys(rig: KeyRig) -> None:
    def run(*arguments: str) -> str:
        result = cli(*arguments, db=rig.location)
        assert result.returncode == 0, result.stderr
        return result.stdout

    options = ["--scope", "inference", "--model", CHAT, "--rpm", "7", "--tpm", "none"]
    text = run("create", "commands", *options, "--expires-in", "30d").splitlines()[-1]
    answer = rig.client.post(CHATS, headers=bearer(text), json=BODY)
    assert answer.headers["X-RateLimit-Limit"] == "7"
    assert "X-RateLimit-Limit-Tokens" not in answer.headers
    found = rig.store.find_key(text.split("-")[1])
    assert found is not None
    assert 29 < ((found.expires or 0) - time.time()) / 86400 < 30
    assert text not in run("list")
    assert found.id in run("list")
    run("limits", "commands", "--rpm", "9")
    new = run("rotate", "commands").splitlines()[-1]
    answer = rig.client.get("/v1/usage", headers=bearer(new))
    assert answer.json()["key"]["limits"]["requests"] == 9
    assert answer.json()["total"]["requests"] == 1
    assert CHAT in run("usage", "commands")
    run("revoke", found.id)
    assert "revoked" in run("list")
    for wrong in (["create", "x", "--scope", "all"], ["revoke", "nobody"], ["rotate", found.id]):
        result = cli(*wrong, db=rig.location)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr


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
    monkeypatch.setattr("server.socket_auth.FIRST_FRAME_SECONDS", 0.05)
    with connect(rig.ws + CHATS) as ws:
        assert closing_code(ws) == 4401


def test_a_revoked_key_ends_an_open_socket_at_its_next_request(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.auth.FRESH_SECONDS", 0.0)
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
