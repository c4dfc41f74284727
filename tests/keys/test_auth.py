"""Every route refuses whom it must, however it is asked."""

import io
import subprocess
import time
from pathlib import Path

import pytest
import websockets
from websockets.sync.client import connect

from server.api.endpoint import access_of
from server.app import create_app
from server.config.settings import Settings
from server.endpoints import ENDPOINTS
from server.keys.guard import Access
from server.keys.key import SCOPES, Scope, digest, new_text
from tests.keys.admins import BODY, CHATS
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import KeyRig, bearer, closing_code
from tests.support.waiting import until

COMPLETION = {"model": CHAT, "prompt": "Hi", "max_tokens": 400}
ACCESS = access_of(ENDPOINTS)
RULES = [
    (rule.rule, ACCESS[rule.endpoint], method)
    for rule in create_app(Settings()).url_map.iter_rules()
    if ACCESS[rule.endpoint] != "public"
    for method in (["WEBSOCKET"] if rule.websocket else sorted(rule.methods or ()))
]


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


@pytest.mark.parametrize(("rule", "access", "method"), RULES)
def test_every_route_refuses_without_a_key_that_counts(
    rig: KeyRig, rule: str, access: Access, method: str
) -> None:
    path = rule.replace("<path:model_id>", CHAT).replace("<file>", "index.html")
    for name, headers in credentials(rig).items():
        assert status_of(rig, method, path, headers) in (401, 4401), name
    if access != "any":
        others = rig.headers(scopes=frozenset(SCOPES) - {access})
        assert status_of(rig, method, path, others) == 403
    scopes = frozenset[Scope]() if access == "any" else frozenset({access})
    good = status_of(rig, method, path, rig.headers(scopes=scopes))
    assert good not in (401, 403, 4401, 4403)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(rig: KeyRig, path: str) -> None:
    assert rig.client.get(path, headers={"Host": "any.example"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/dashboard", "/docs", "/pages/api.js"])
def test_pages_need_no_key_and_are_the_same_for_everybody(rig: KeyRig, path: str) -> None:
    answers = [rig.client.get(path, headers=each) for each in ({}, rig.headers(), bearer("x"))]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.content for answer in answers}) == 1
    assert rig.client.post(path).status_code == 401


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

    def becomes(text: str, wanted: int) -> None:
        until(lambda: status(text) == wanted, 2)

    key, text = rig.key()
    assert status(text) == 200
    new = new_text(key.id)
    rig.change(key, digest=digest(rig.store.pepper(), new))
    assert status(new) == 200  # at once, though the old one may have been looked up just now
    becomes(text, 401)
    rig.change(key, revoked=time.time())
    becomes(new, 401)
    brief = rig.key(expires=time.time() + 0.5)[1]
    assert status(brief) == 200
    becomes(brief, 401)


def test_no_key_is_repeated_anywhere(rig: KeyRig, logged: io.StringIO) -> None:
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
    # By another process: to close the file in this one would end the locks of its connections.
    files = list(Path(rig.location).parent.iterdir())
    kept = subprocess.run(["cat", *files], capture_output=True, check=True).stdout
    assert digest(rig.store.pepper(), text).encode() in kept
    assert text.split("-")[1] in logged.getvalue()  # its id is there
    for hidden in (secret, bad.rpartition("-")[2]):
        assert hidden not in shown
        assert hidden not in logged.getvalue()
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
