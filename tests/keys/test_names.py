"""Names of keys show as what they are, however they are given."""

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.keys.key import new_key
from server.keys.store.open import open_store
from server.observe.terminal import escaped, hidden_in
from tests.keys.admins import Ask, ask, rig

__all__ = ["ask", "rig"]
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
VISIBLE = ("laptop", "Büro 3", "東京\u3000チーム", "مكتب", "naïve \U0001f600", "[bold]:x:")


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_characters_are_refused_everywhere(
    ask: Ask, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"ad{HIDDEN[kind]}min"
    kept = ask("POST", "", {"name": "kept", "models": ["kept"]}).json()
    for method, path in (("POST", ""), ("PATCH", f"/{kept['id']}")):
        for changes in ({"name": text}, {"models": [text]}):
            answer = ask(method, path, {"name": "other"} | changes)
            assert answer.status_code == 400, changes
            error = answer.json()["error"]
            assert error["param"] in changes
            assert f"U+{ord(HIDDEN[kind]):04X}" in error["message"]
            assert HIDDEN[kind] not in error["message"]
    assert [key["name"] for key in ask("GET", "").json()["data"] if key["name"] != "test"] == [
        "kept"
    ]
    database = str(tmp_path / "cli.db")
    for arguments in ([text], ["name", "--model", text]):
        done = CliRunner().invoke(app, ["keys", "create", *arguments, "--db", database])
        assert done.exit_code == 1
        assert f"U+{ord(HIDDEN[kind]):04X}" in str(done.exception)
    assert open_store(database).list_keys() == []


@pytest.mark.parametrize("name", VISIBLE)
def test_other_names_are_taken(ask: Ask, name: str) -> None:
    answer = ask("POST", "", {"name": name})
    assert answer.status_code == 201
    assert answer.json()["name"] == name
    assert hidden_in(name) is None
    assert escaped(name) == name


def test_the_command_escapes_names_of_before(tmp_path: Path) -> None:
    database = str(tmp_path / "keys.db")
    store = open_store(database)
    key, _ = new_key(
        store.pepper(), name="ad\u202emin\x1b[2J", created=time.time(), models=("a\u2028b",)
    )
    store.add_key(key)
    store.close()
    for command in (["list"], ["rotate", key.id], ["usage", key.id]):
        done = CliRunner().invoke(app, ["keys", *command, "--db", database])
        assert done.exit_code == 0
        assert not {"\u202e", "\x1b", "\u2028"} & set(done.output)
    assert escaped(key.name) == r"ad\u202emin\x1b[2J"
