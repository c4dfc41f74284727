"""Managing keys over HTTP: by those who may, and never so that nobody may any more."""

import io
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inferneo_jax import Tokenizer
from tests.keys.admins import ADMIN, BODY, CHATS, KEYS, Ask, ask, rig
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import KeyRig, bearer, key_rig

__all__ = ["ask", "rig"]


def test_a_key_is_made_used_changed_and_ended(rig: KeyRig, ask: Ask) -> None:
    limits = {"requests": 7, "tokens": "none"}
    made = ask("POST", "", {"name": "web", "models": [CHAT], "limits": limits, "expires_in": 60})
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    card = made.json()
    text, key_id = card.pop("key"), card["id"]
    assert text.split("-")[1] == key_id
    assert card["state"] == "active"
    assert card["scopes"] == ["embeddings", "inference"]
    assert card["limits"] == {
        "requests": 7,
        "tokens": None,
        "day_requests": 3500,
        "concurrent": None,
    }
    assert 50 < card["expires"] - time.time() <= 61
    standing = {**card, "used": dict.fromkeys(card["limits"], 0)}
    assert ask("GET", f"/{key_id}").json() == standing
    assert standing in ask("GET", "").json()["data"]

    answer = rig.client.post(CHATS, headers=bearer(text), json=BODY)
    assert (answer.status_code, answer.headers["X-RateLimit-Limit"]) == (200, "7")
    usage = ask("GET", f"/{key_id}/usage").json()
    assert usage["total"]["requests"] == 1
    own = rig.client.get("/v1/usage", headers=bearer(text)).json()
    assert usage == own

    changes = {"name": "web 2", "limits": {"requests": 9}, "models": [], "expires_in": "never"}
    changed = ask("PATCH", f"/{key_id}", changes)
    assert changed.status_code == 200, changed.text
    card |= {"name": "web 2", "models": [], "expires": None}
    card["limits"]["requests"] = 9
    assert changed.json() == card
    answer = rig.client.get("/v1/usage", headers=bearer(text))
    assert answer.headers["X-RateLimit-Limit"] == "9"  # at once

    rotated = ask("POST", f"/{key_id}/rotate")
    assert (rotated.status_code, rotated.headers["Cache-Control"]) == (200, "no-store")
    new = rotated.json()["key"]
    assert rig.client.get("/v1/models", headers=bearer(text)).status_code == 401
    assert rig.client.get("/v1/models", headers=bearer(new)).status_code == 200

    for _ in range(2):
        ended = ask("DELETE", f"/{key_id}")
        assert (ended.status_code, ended.json()["state"]) == (200, "revoked")
    assert rig.client.get("/v1/models", headers=bearer(new)).status_code == 401
    for method, path, body in (("PATCH", "", {"name": "x"}), ("POST", "/rotate", None)):
        refused = ask(method, f"/{key_id}{path}", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "key_conflict")


def test_what_does_not_exist_is_not_found(ask: Ask) -> None:
    for method, path, body in (
        ("GET", "", None),
        ("PATCH", "", {"name": "x"}),
        ("DELETE", "", None),
        ("POST", "/rotate", None),
        ("GET", "/usage", None),
    ):
        answer = ask(method, "/0000000000" + path, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found")


def test_the_last_who_may_manage_keys_cannot_be_ended_here(rig: KeyRig) -> None:
    first, text = rig.key(scopes=frozenset({"admin", "inference"}))
    rig.key(scopes=frozenset({"admin"}), expires=time.time() - 5)
    path, headers = f"{KEYS}/{first.id}", bearer(text)
    for method, body in (
        ("DELETE", None),
        ("PATCH", {"scopes": ["inference"]}),
        ("PATCH", {"expires_in": 5}),
    ):
        refused = rig.client.request(method, path, headers=headers, json=body)
        assert refused.status_code == 409, refused.text
        assert "last one" in refused.json()["error"]["message"]
    kept = rig.client.patch(path, headers=headers, json={"scopes": ["admin"]})
    assert kept.status_code == 200
    rig.key(scopes=frozenset({"admin"}))
    assert rig.client.delete(path, headers=headers).status_code == 200
    assert rig.client.get(KEYS, headers=headers).status_code == 401


def test_expiries_cannot_leave_nobody_to_manage_keys_later(rig: KeyRig) -> None:
    """Else each of two keys could be given an expiry because the other counts at the moment."""
    first, (second, text) = rig.key(scopes=ADMIN)[0], rig.key(scopes=ADMIN)
    brief, last = f"{KEYS}/{first.id}", f"{KEYS}/{second.id}"

    def ask(method: str, path: str, body: Any = None) -> int:
        return rig.client.request(method, path, json=body, headers=bearer(text)).status_code

    assert ask("PATCH", brief, {"expires_in": 3600}) == 200
    for method, body in (
        ("PATCH", {"expires_in": 7200}),
        ("PATCH", {"scopes": ["inference"]}),
        ("DELETE", None),
    ):
        assert ask(method, last, body) == 409
    assert rig.store.find_key(second.id) == second
    assert ask("PATCH", brief, {"expires_in": 60}) == 200
    assert ask("PATCH", brief, {"expires_in": 7200}) == 200
    assert ask("PATCH", brief, {"expires_in": "never"}) == 200
    assert ask("PATCH", last, {"expires_in": 3600}) == 200


def test_a_key_that_expires_may_last_longer_but_the_last_not_less_long(rig: KeyRig) -> None:
    until = time.time() + 3600
    (first, _), (key, text) = (rig.key(scopes=ADMIN, expires=until) for _ in range(2))
    # Among keys that expire any other may take over.
    assert rig.client.delete(f"{KEYS}/{first.id}", headers=bearer(text)).status_code == 200
    for expires_in, status in ((1800, 409), (7200, 200), ("never", 200), (7200, 409)):
        body = {"expires_in": expires_in}
        answer = rig.client.patch(f"{KEYS}/{key.id}", json=body, headers=bearer(text))
        assert answer.status_code == status, expires_in


@pytest.mark.parametrize("require", ["auto", "false"])
def test_a_server_without_keys_lets_nobody_manage_them(
    tokenizer: Tokenizer, tmp_path: Path, require: str
) -> None:
    with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key=require) as rig:
        for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/0000000000")):
            refused = rig.client.request(method, KEYS + path, json={"name": "mine"})
            assert refused.status_code == 403
            assert "--scope admin" in refused.json()["error"]["message"]
        assert rig.store.list_keys() == []
        if require == "false":
            admin = rig.headers(scopes=frozenset({"admin"}))
            assert rig.client.get(KEYS, headers=admin).status_code == 200
            assert rig.client.get(KEYS, headers=rig.headers()).status_code == 403


def test_every_change_is_one_line_of_the_log_and_no_secret_is_in_it(
    rig: KeyRig, logged: io.StringIO
) -> None:
    acting, own = rig.key(scopes=ADMIN)

    def ask(method: str, path: str = "", body: Any = None) -> httpx.Response:
        answer = rig.client.request(method, KEYS + path, json=body, headers=bearer(own))
        assert answer.is_success
        return answer

    created = ask("POST", "", {"name": "seen", "models": [EMBED]})
    path = "/" + created.json()["id"]
    changed = ask("PATCH", path, {"name": "seen too"})
    for same in ({"name": "seen too"}, {}):
        ask("PATCH", path, same)
    rotated = ask("POST", path + "/rotate")
    revoked, _ = ask("DELETE", path), ask("DELETE", path)
    text = logged.getvalue()
    lines = [line for line in map(orjson.loads, text.splitlines()) if "target" in line]
    assert [(line["event"], line["id"]) for line in lines] == [
        (event, answer.headers["X-Request-Id"])
        for event, answer in (
            ("key_created", created),
            ("key_changed", changed),
            ("key_rotated", rotated),
            ("key_revoked", revoked),
        )
    ]
    assert {(line["key"], line["target"]) for line in lines} == {(acting.id, path[1:])}
    kept = rig.store.find_key(path[1:])
    assert kept is not None
    listed = ask("GET").text
    secrets = [answer.json()["key"].split("-")[2] for answer in (created, rotated)]
    for secret in (*secrets, kept.digest):
        assert secret not in text
        assert secret not in listed


def test_nothing_that_is_kept_of_a_secret_is_ever_answered(rig: KeyRig, ask: Ask) -> None:
    key, text = rig.key(scopes=ADMIN)
    path = f"/{key.id}"
    answers = [
        ask("GET", ""),
        ask("GET", path),
        ask("PATCH", path, {"name": "new"}),
        ask("PATCH", path, {"digest": key.digest}),
        ask("GET", path + "/usage"),
        ask("GET", "/usage", base="/admin"),
        ask("POST", path + "/rotate"),
        ask("DELETE", path),
        ask("POST", path + "/rotate"),
    ]
    answers += [
        ask(method, f"/{text}{end}", {"name": "x"} if method == "PATCH" else None)
        for method, end in (
            *(("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate"), ("GET", "/usage")),
        )
    ]
    assert [answer.status_code for answer in answers[9:]] == [404] * 5
    rotated = rig.store.find_key(key.id)
    assert rotated is not None
    for answer in answers:
        parts = key.digest, rotated.digest, rig.store.pepper().hex(), text.split("-")[2]
        for hidden in (part[:8] for part in parts):
            assert hidden not in answer.text + str(answer.headers)
    assert [answer.text.count("inferneo-") for answer in answers] == [*[0] * 6, 1, *[0] * 7]


def test_a_key_without_the_scope_is_told_so(rig: KeyRig) -> None:
    headers = rig.headers(scopes=frozenset({"inference", "embeddings", "metrics"}))
    before = rig.store.list_keys()
    for method, path in (("GET", KEYS), ("POST", KEYS), ("GET", "/admin/usage")):
        refused = rig.client.request(method, path, headers=headers, json={"name": "mine"})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "insufficient_scope"
    assert rig.store.list_keys() == before


def test_another_server_of_the_same_store_notices_within_a_second(
    rig: KeyRig, ask: Ask, tokenizer: Tokenizer
) -> None:
    key, text = rig.key()
    with key_rig(tokenizer, rig.location) as other:
        assert other.client.get("/v1/models", headers=bearer(text)).status_code == 200
        assert ask("DELETE", f"/{key.id}").status_code == 200
        began = ended = time.monotonic()
        while other.client.get("/v1/models", headers=bearer(text)).status_code == 200:
            assert began < ended + 1.5  # of those that began later none may be served
            began = time.monotonic()
        assert rig.client.get("/v1/models", headers=bearer(text)).status_code == 401
