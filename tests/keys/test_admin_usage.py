"""What keys used, by days; and the command line, which shows and does the same."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferneo_jax import Tokenizer
from server.keys.key import Key, Limits
from server.keys.keyring import Keyring, KeyringError
from server.keys.store.store import DAY_SECONDS, Reservation, Usage
from tests.keys.admins import ADMIN, BODY, CHATS, KEYS, Ask, ask, rig
from tests.support.fake_server import CHAT
from tests.support.keyed_server import KeyRig, bearer, key_rig
from tests.support.paths import ROOT
from tests.support.waiting import until

__all__ = ["ask", "rig"]


def charge(rig: KeyRig, key: Key, model: str, day: int, tokens: int) -> None:
    """A call of the past."""
    call = Reservation(id=f"{key.id}{model}{day}", model=model, prompt=tokens, completion=1)
    at = day * DAY_SECONDS + 60.0
    rig.store.reserve(key.id, key.limits, call, at)
    rig.store.settle(key.id, call.id, Usage(prompt=tokens, completion=1), at)


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


def test_a_key_shows_what_it_uses_of_its_limits_as_its_headers_do(rig: KeyRig, ask: Ask) -> None:
    limits = Limits(requests=5, tokens=1000, day_requests=9)
    key, text = rig.key(limits)
    rig.engine.limit = 1
    body = {**BODY, "max_tokens": 40, "stream": True}
    with rig.client.stream("POST", CHATS, headers=bearer(text), json=body) as response:
        lines = response.iter_lines()
        next(lines)
        running = ask("GET", f"/{key.id}").json()
        left = 1000 - int(response.headers["X-RateLimit-Remaining-Tokens"])
        assert running["used"] == {
            "requests": 1,
            "tokens": left,  # reserved
            "day_requests": 1,
            "concurrent": 1,
        }
        assert left > 40
        rig.engine.release()
        list(lines)
    ended = ask("GET", f"/{key.id}").json()
    assert ended["used"]["concurrent"] == 0
    assert 0 < ended["used"]["tokens"] < left
    assert ended in ask("GET", "").json()["data"]
    assert ended["limits"] == dataclasses.asdict(limits)


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
    assert [card.pop("used")["requests"] for card in cards] == [1, 0]
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
    until(lambda: rig.client.get(KEYS, headers=bearer(text)).status_code == 401, 5)


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
