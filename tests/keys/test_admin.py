"""Managing keys over HTTP: by those who may, and never so that nobody may any more."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import CHAT, EMBED
from rigs import KeyRig, bearer, key_rig

from inferneo_jax import Tokenizer
from server import log

KEYS = "/admin/keys"
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
Ask = Callable[..., httpx.Response]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def ask(rig: KeyRig) -> Ask:
    """Requests of an administrator."""
    headers = rig.headers(scopes=frozenset({"admin"}))

    def send(method: str, path: str, body: Any = None) -> httpx.Response:
        return rig.client.request(method, KEYS + path, json=body, headers=headers)

    return send


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
    assert ask("GET", f"/{key_id}").json() == card
    assert card in ask("GET", "").json()["data"]

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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "   "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes[0]"),
        ({"name": "x", "limits": {"requests": 0}}, "limits.requests.int"),
        ({"name": "x", "limits": {"request": 5}}, "limits.request"),
        ({"name": "x", "expires_in": -5}, "expires_in.int"),
        ({"name": "x", "digest": "0"}, "digest"),
        ({"name": "x", "id": "0"}, "id"),
    ],
)
def test_a_wrong_body_is_refused_whole(
    rig: KeyRig, ask: Ask, body: dict[str, Any], param: str
) -> None:
    before = ask("GET", "").json()
    refused = ask("POST", "", body)
    assert refused.status_code == 400, refused.text
    assert (refused.json()["error"]["param"] or "").startswith(param.split(".int")[0])
    assert ask("GET", "").json() == before


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
    for key in rig.store.list_keys():
        rig.change(key, revoked=1.0)
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


def test_every_change_is_logged_and_no_secret_is(
    rig: KeyRig, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    made = ask("POST", "", {"name": "seen", "models": [EMBED]}).json()
    ask("PATCH", f"/{made['id']}", {"name": "seen too"})
    rotated = ask("POST", f"/{made['id']}/rotate").json()
    ask("DELETE", f"/{made['id']}")
    kept = rig.store.find_key(made["id"])
    assert kept is not None
    logged = capsys.readouterr().err
    for event in ("key_created", "key_changed", "key_rotated", "key_revoked"):
        line = next(line for line in logged.splitlines() if f'"{event}"' in line)
        assert f'"target": "{made["id"]}"' in line
    listed = ask("GET", "").text
    for secret in (made["key"].split("-")[2], rotated["key"].split("-")[2], kept.digest):
        assert secret not in logged
        assert secret not in listed


def cli(*arguments: str, db: str) -> str:
    command = [sys.executable, "-m", "server.cli", "keys", *arguments, "--db", db]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["[/x]", "[red]a[/red]", ":smile:", "\u540d\u524d"])
def test_names_are_shown_by_the_command_line_as_they_are(location: str, name: str) -> None:
    printed = cli("create", name, db=location)
    assert f"({name})" in printed
    assert printed.splitlines()[-1].startswith("inferneo-")
    assert name in cli("list", db=location)
