"""Managing keys over HTTP: by those who may, and never so that nobody may any more."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from harness import CHAT, EMBED
from rigs import KeyRig, bearer, key_rig

from inferneo_jax import Tokenizer
from server import log
from server.keyring import Keyring, KeyringError
from server.keys import Key
from server.store import DAY_SECONDS, Call, Spent

KEYS = "/admin/keys"
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
Ask = Callable[..., httpx.Response]
ADMIN = frozenset({"admin"})
ROOT = Path(__file__).parents[2]


@pytest.fixture
def rig(tokenizer: Tokenizer, location: str) -> Iterator[KeyRig]:
    """A server of its own for each test, over each store."""
    with key_rig(tokenizer, location) as found:
        yield found


@pytest.fixture
def ask(rig: KeyRig) -> Ask:
    """Requests of an administrator."""
    headers = rig.headers(scopes=frozenset({"admin"}))

    def send(method: str, path: str, body: Any = None, base: str = KEYS) -> httpx.Response:
        return rig.client.request(method, base + path, json=body, headers=headers)

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
        ({"name": "x", "models": [""]}, "models"),
        ({"name": "x", "models": ["\x1b[2J"]}, "models"),
        ({"name": "x", "models": ["m" * 513]}, "models"),
        ({"name": "x", "expires_in": 1.5}, "expires_in"),
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


def test_the_last_key_may_last_longer_but_not_less_long(rig: KeyRig) -> None:
    key, text = rig.key(scopes=ADMIN, expires=time.time() + 3600)
    for expires_in, status in ((1800, 409), (7200, 200), ("never", 200), (7200, 409)):
        body = {"expires_in": expires_in}
        answer = rig.client.patch(f"{KEYS}/{key.id}", json=body, headers=bearer(text))
        assert answer.status_code == status, expires_in


def test_among_keys_that_expire_any_other_may_take_over(rig: KeyRig) -> None:
    until = time.time() + 3600
    (first, _), (_, text) = (rig.key(scopes=ADMIN, expires=until) for _ in range(2))
    assert rig.client.delete(f"{KEYS}/{first.id}", headers=bearer(text)).status_code == 200


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


def test_what_changes_nothing_leaves_no_line_in_the_log(
    rig: KeyRig, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    key, _ = rig.key()
    for _ in range(2):
        assert ask("PATCH", f"/{key.id}", {"name": "other"}).status_code == 200
    assert ask("PATCH", f"/{key.id}", {}).status_code == 200
    for _ in range(2):
        assert ask("DELETE", f"/{key.id}").status_code == 200
    logged = capsys.readouterr().err
    assert [logged.count(f'"{event}"') for event in ("key_changed", "key_revoked")] == [1, 1]


def test_every_line_names_who_did_it_and_in_which_request(
    rig: KeyRig, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    acting, text = rig.key(scopes=ADMIN)
    made = rig.client.post(KEYS, json={"name": "x"}, headers=bearer(text))
    lines = map(orjson.loads, capsys.readouterr().err.splitlines())
    (line,) = [line for line in lines if line["event"] == "key_created"]
    assert (line["key"], line["target"]) == (acting.id, made.json()["id"])
    assert line["id"] == made.headers["X-Request-Id"]


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
    for method, path in (("GET", KEYS), ("POST", KEYS), ("GET", "/admin/usage")):
        refused = rig.client.request(method, path, headers=headers, json={"name": "mine"})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "insufficient_scope"
    assert len(rig.store.list_keys()) == 1


def test_another_server_of_the_same_store_notices_within_a_second(
    rig: KeyRig, ask: Ask, tokenizer: Tokenizer
) -> None:
    key, text = rig.key()
    with key_rig(tokenizer, rig.location) as other:
        assert other.client.get("/v1/models", headers=bearer(text)).status_code == 200
        assert ask("DELETE", f"/{key.id}").status_code == 200
        ended = time.monotonic()
        while other.client.get("/v1/models", headers=bearer(text)).status_code == 200:
            began = time.monotonic()
            assert began < ended + 1.5  # of those that began later none may be served
        assert rig.client.get("/v1/models", headers=bearer(text)).status_code == 401


def charge(rig: KeyRig, key: Key, model: str, day: int, tokens: int) -> None:
    """A call of the past."""
    call = Call(id=f"{key.id}{model}{day}", model=model, prompt=tokens, completion=1)
    at = day * DAY_SECONDS + 60.0
    rig.store.reserve(key.id, key.limits, call, at)
    rig.store.settle(key.id, call.id, Spent(prompt=tokens, completion=1), at)


def test_usage_is_told_of_each_key_and_all_between_two_days(rig: KeyRig, ask: Ask) -> None:
    first, second = rig.key()[0], rig.key()[0]
    for key, day in itertools.product((first, second), (1, 2, 31)):  # of January 1970
        charge(rig, key, "m", day - 1, 10 * day)
    charge(rig, second, "other", 1, 5)

    def dates(path: str) -> list[str]:
        answer = ask("GET", path, base="/admin").json()
        for name in ("requests", "prompt_tokens"):
            assert answer["total"][name] == sum(row[name] for row in answer["data"])
        return [row["date"] for row in answer["data"]]

    days = ["1970-01-01", "1970-01-02", "1970-01-31"]
    one = f"/keys/{first.id}/usage"
    assert dates(one) == days
    assert dates(one + "?since=1970-01-02") == days[1:]
    assert dates(one + "?until=1970-01-30") == days[:2]
    assert dates(one + "?since=1970-01-02&until=1970-01-02") == days[1:2]
    assert dates(one + "?since=1970-02-01") == dates("/usage?until=1969-12-31") == []
    assert dates("/usage") == [*days, *days[:2], days[1], days[2]]
    every = ask("GET", "/usage?since=1970-01-02&until=1970-01-02", base="/admin").json()
    assert [(row["key"], row["name"], row["model"]) for row in every["data"]] == [
        (first.id, "test", "m"),
        (second.id, "test", "m"),
        (second.id, "test", "other"),
    ]
    assert every["total"] == {
        "requests": 3,
        "prompt_tokens": 45,
        "completion_tokens": 3,
        "cached_tokens": 0,
    }


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=yesterday", "since"),
        ("since=", "since"),
        ("until=2026-02-30", "until"),
        ("until=20260131", "until"),
        ("since=2026-01-01&since=2026-01-02", "since"),
        ("since=2026-01-02&until=2026-01-01", "since"),
    ],
)
def test_a_wrong_day_is_refused(ask: Ask, query: str, param: str) -> None:
    refused = ask("GET", f"/usage?{query}", base="/admin")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def cli(*arguments: str, db: str) -> str:
    command = [sys.executable, "-m", "server.cli", "keys", *arguments, "--db", db]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_line_and_http_show_and_do_the_same(rig: KeyRig, ask: Ask) -> None:
    options = ["--model", CHAT, "--rpm", "7", "--tpm", "none", "--expires-in", "1h"]
    text = cli("create", "shared", *options, db=rig.location).splitlines()[-1]
    assert rig.client.post(CHATS, headers=bearer(text), json=BODY).status_code == 200
    limits = {"requests": 7, "tokens": "none"}
    body = {"name": "shared 2", "models": [CHAT], "limits": limits, "expires_in": 3600}
    made = ask("POST", "", body).json()
    by_name = {card["name"]: card for card in ask("GET", "").json()["data"]}
    cards = [by_name[name] for name in ("shared", "shared 2")]
    assert abs(cards[0]["expires"] - cards[1]["expires"]) < 60
    for card in cards:
        for name in ("id", "name", "created", "expires"):
            del card[name]
    assert cards[0] == cards[1]

    assert orjson.loads(cli("list", "--json", db=rig.location)) == ask("GET", "").json()
    every = ask("GET", "/usage", base="/admin").json()
    assert every["total"]["requests"] == 1
    assert orjson.loads(cli("usage", "--json", db=rig.location)) == every

    cli("revoke", "shared 2", db=rig.location)
    assert ask("GET", f"/{made['id']}").json()["state"] == "revoked"


def test_the_command_line_can_end_the_last_who_may_manage_keys(rig: KeyRig) -> None:
    key, text = rig.key(scopes=ADMIN)
    assert rig.client.delete(f"{KEYS}/{key.id}", headers=bearer(text)).status_code == 409
    cli("revoke", key.id, db=rig.location)
    end = time.monotonic() + 5
    while rig.client.get(KEYS, headers=bearer(text)).status_code != 401:
        assert time.monotonic() < end


@pytest.mark.parametrize("name", ["[/x]", "[red]a[/red]", ":smile:", "\u540d\u524d"])
def test_names_are_shown_by_the_command_line_as_they_are(location: str, name: str) -> None:
    printed = cli("create", name, db=location)
    assert f"({name})" in printed
    assert printed.splitlines()[-1].startswith("inferneo-")
    assert name in cli("list", db=location)


def test_asking_without_any_key_makes_no_database(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    with key_rig(tokenizer, str(path)) as rig:
        for headers in ({}, bearer("inferneo-0000000000-" + "0" * 22)):
            refused = rig.client.get(KEYS, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                *(403, "admin_key_required"),
            )
        assert not path.exists()


def test_a_keyring_finds_by_id_or_by_the_only_living_name(rig: KeyRig) -> None:
    keyring = Keyring(rig.store)
    old, _ = keyring.create("twin")
    new, _ = keyring.create("twin")
    with pytest.raises(KeyringError, match=f"several keys.*{old.id}, {new.id}"):
        keyring.find("twin")
    keyring.revoke(old)
    assert keyring.find("twin").id == new.id
    assert keyring.find(old.id).id == old.id
    with pytest.raises(KeyringError, match="no key 'nobody'"):
        keyring.find("nobody")


def test_a_keyring_never_repeats_the_text_of_a_key(rig: KeyRig) -> None:
    keyring = Keyring(rig.store)
    key, text = keyring.create("mine")
    with pytest.raises(KeyringError, match=key.id) as caught:
        keyring.find(text)
    assert text.split("-")[2][:8] not in str(caught.value)
    assert keyring.get(key.id) == key


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"scopes": []}, "scopes"),
        ({"models": ["\x1b[2J"]}, "models"),
        ({"limits": {"tokens": -1}}, "limits.tokens"),
        ({"limits": {"requests": 5}, "expires_in": 0}, "expires_in"),
        ({"limits": {"requests": 5}, "revoked": 1}, "revoked"),
    ],
)
def test_a_wrong_change_changes_nothing(
    rig: KeyRig, ask: Ask, body: dict[str, Any], param: str
) -> None:
    key, _ = rig.key()
    refused = ask("PATCH", f"/{key.id}", body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"].startswith(param)
    assert rig.store.find_key(key.id) == key
