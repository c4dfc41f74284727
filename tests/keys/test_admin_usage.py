"""What keys used, by days; and the command line, which shows and does the same."""

import dataclasses
import itertools
import time
from pathlib import Path

import orjson
import pytest

from inferneo_jax import InferneoError, Tokenizer
from server.keys.key import Key, Limits
from server.keys.keyring import Keyring, KeyringError
from server.keys.store.store import DAY_SECONDS, Reservation, Usage
from tests.keys.admins import ADMIN, BODY, CHATS, KEYS, Ask, ask, keys_command, printed, rig
from tests.support.fake_server import CHAT
from tests.support.keyed_server import KeyRig, bearer, key_rig
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
    of_1970 = [*days, *days[:2], days[1], days[2]]
    assert dates("/usage?until=1970-12-31") == dates("/usage")[: len(of_1970)] == of_1970
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


def test_the_command_line_and_http_show_and_do_the_same(rig: KeyRig, ask: Ask) -> None:
    def run(*arguments: str) -> str:
        return printed(*arguments, db=rig.location)

    before = ask("GET", "/usage", base="/admin").json()["total"]["requests"]
    options = ["--scope", "inference", "--model", CHAT, "--rpm", "7", "--tpm", "none"]
    text = run("create", "shared", *options, "--expires-in", "30d").splitlines()[-1]
    answer = rig.client.post(CHATS, headers=bearer(text), json=BODY)
    assert (answer.status_code, answer.headers["X-RateLimit-Limit"]) == (200, "7")
    assert "X-RateLimit-Limit-Tokens" not in answer.headers
    body = {
        "name": "shared 2",
        "scopes": ["inference"],
        "models": [CHAT],
        "limits": {"requests": 7, "tokens": "none"},
        "expires_in": 30 * 86_400,
    }
    made = ask("POST", "", body).json()
    by_name = {card["name"]: card for card in ask("GET", "").json()["data"]}
    cards = [by_name[name] for name in ("shared", "shared 2")]
    assert 29 < (cards[0]["expires"] - time.time()) / 86_400 < 30
    assert abs(cards[0]["expires"] - cards[1]["expires"]) < 60
    assert [card.pop("used")["requests"] for card in cards] == [1, 0]
    key_id = cards[0]["id"]
    for card in cards:
        for name in ("id", "name", "created", "expires"):
            del card[name]
    assert cards[0] == cards[1]
    assert orjson.loads(run("list", "--json")) == ask("GET", "").json()
    every = ask("GET", "/usage", base="/admin").json()
    assert every["total"]["requests"] == before + 1
    assert orjson.loads(run("usage", "--json")) == every
    assert CHAT in run("usage", "shared")

    assert text not in run("list")
    assert key_id in run("list")
    run("limits", "shared", "--rpm", "9")
    new = run("rotate", "shared").splitlines()[-1]
    usage = rig.client.get("/v1/usage", headers=bearer(new)).json()
    assert (usage["key"]["limits"]["requests"], usage["total"]["requests"]) == (9, 1)
    run("revoke", key_id)
    run("revoke", "shared 2")
    assert ask("GET", f"/{made['id']}").json()["state"] == "revoked"
    (line,) = [line for line in run("list").splitlines() if key_id in line]
    assert "revoked" in line
    for wrong in (["create", "x", "--scope", "all"], ["revoke", "nobody"], ["rotate", key_id]):
        assert isinstance(keys_command(*wrong, db=rig.location).exception, InferneoError)


def test_the_command_line_can_end_the_last_who_may_manage_keys(rig: KeyRig) -> None:
    key, text = rig.key(scopes=ADMIN)
    assert rig.client.delete(f"{KEYS}/{key.id}", headers=bearer(text)).status_code == 409
    printed("revoke", key.id, db=rig.location)
    until(lambda: rig.client.get(KEYS, headers=bearer(text)).status_code == 401, 5)


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
