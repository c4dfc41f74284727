"""What an administrator sends is taken whole or refused whole; names show as what they are."""

import time
from pathlib import Path
from typing import Any

import pytest

from server.keys.key import new_key
from server.keys.store.open import open_store
from server.observe.terminal import escaped, hidden_in
from tests.keys.admins import Ask, ask, keys_command, printed
from tests.support.keyed_server import KeyRig

__all__ = ["ask"]
HIDDEN = {
    "a control character": "\x1b",
    "another control character": "\x85",
    "DEL": "\x7f",
    "a line feed": "\n",
    "right-to-left override": "\u202e",
    "right-to-left isolate": "\u2067",
    "right-to-left mark": "\u200f",
    "zero-width space": "\u200b",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "a tag": "\U000e0041",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "private use": "\ue000",
    "unassigned": "\u0378",
    "a noncharacter": "\uffff",
}
VISIBLE = (
    *("laptop", "Büro 3", "東京\u3000チーム", "مكتب", "naïve \U0001f600", "[bold]:x:"),
    *("[/x]", "[red]a[/red]", ":smile:", "\u540d\u524d"),
)


@pytest.mark.parametrize(
    ("method", "body", "param"),
    [
        ("POST", {}, "name"),
        *(("POST", {"name": name}, "name") for name in ("", "   ", "a\nb", "x" * 101)),
        *(
            ("POST", {"name": "x"} | body, param)
            for body, param in (
                ({"scopes": []}, "scopes"),
                ({"scopes": ["root"]}, "scopes[0]"),
                ({"limits": {"requests": 0}}, "limits.requests"),
                ({"limits": {"request": 5}}, "limits.request"),
                ({"expires_in": -5}, "expires_in"),
                ({"models": [""]}, "models"),
                ({"models": ["\x1b[2J"]}, "models"),
                ({"models": ["m" * 513]}, "models"),
                ({"expires_in": 1.5}, "expires_in"),
                ({"digest": "0"}, "digest"),
                ({"id": "0"}, "id"),
            )
        ),
        ("PATCH", {"name": ""}, "name"),
        ("PATCH", {"scopes": []}, "scopes"),
        ("PATCH", {"models": ["\x1b[2J"]}, "models"),
        ("PATCH", {"limits": {"tokens": -1}}, "limits.tokens"),
        ("PATCH", {"limits": {"requests": 5}, "expires_in": 0}, "expires_in"),
        ("PATCH", {"limits": {"requests": 5}, "revoked": 1}, "revoked"),
    ],
)
def test_a_wrong_body_changes_nothing(
    rig: KeyRig, ask: Ask, method: str, body: dict[str, Any], param: str
) -> None:
    path = f"/{rig.key()[0].id}" if method == "PATCH" else ""
    before = rig.store.list_keys()
    refused = ask(method, path, body)
    assert refused.status_code == 400, refused.text
    assert (refused.json()["error"]["param"] or "").startswith(param)
    assert rig.store.list_keys() == before


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


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_characters_are_refused_everywhere(
    rig: KeyRig, ask: Ask, kind: str, tmp_path: Path
) -> None:
    text = f"ad{HIDDEN[kind]}min"
    kept = ask("POST", "", {"name": "kept", "models": ["kept"]}).json()
    before = rig.store.list_keys()
    for method, path in (("POST", ""), ("PATCH", f"/{kept['id']}")):
        for changes in ({"name": text}, {"models": [text]}):
            answer = ask(method, path, {"name": "other"} | changes)
            assert answer.status_code == 400, changes
            error = answer.json()["error"]
            assert error["param"] in changes
            assert f"U+{ord(HIDDEN[kind]):04X}" in error["message"]
            assert HIDDEN[kind] not in error["message"]
    assert rig.store.list_keys() == before
    database = str(tmp_path / "cli.db")
    for arguments in ([text], ["name", "--model", text]):
        done = keys_command("create", *arguments, db=database)
        assert done.exit_code == 1
        assert f"U+{ord(HIDDEN[kind]):04X}" in str(done.exception)
    assert open_store(database).list_keys() == []


@pytest.mark.parametrize("name", VISIBLE)
def test_other_names_are_taken_and_shown_as_they_are(rig: KeyRig, ask: Ask, name: str) -> None:
    answer = ask("POST", "", {"name": name})
    assert answer.status_code == 201
    assert answer.json()["name"] == name
    assert hidden_in(name) is None
    assert escaped(name) == name
    said = printed("create", name, db=rig.location)
    assert f"({name})" in said
    assert said.splitlines()[-1].startswith("inferneo-")
    assert printed("list", db=rig.location).count(name) >= 2


def test_the_command_escapes_names_of_before(tmp_path: Path) -> None:
    database = str(tmp_path / "keys.db")
    store = open_store(database)
    key, _ = new_key(
        store.pepper(), name="ad\u202emin\x1b[2J", created=time.time(), models=("a\u2028b",)
    )
    store.add_key(key)
    store.close()
    for command in (["list"], ["rotate", key.id], ["usage", key.id]):
        assert not {"\u202e", "\x1b", "\u2028"} & set(printed(*command, db=database))
    assert escaped(key.name) == r"ad\u202emin\x1b[2J"
