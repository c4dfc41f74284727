"""Whom a server serves that has no keys, or asks for none."""

from pathlib import Path
from typing import Any

import pytest
import websockets
from harness import CHAT
from rigs import KeyRig, bearer, key_rig
from websockets.sync.client import connect

from inferneo_jax import Tokenizer
from server.access.keys import new_text
from server.app import create_app
from server.settings import Settings

ROOT = Path(__file__).parents[2]
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": CHAT, "prompt": "Hi", "max_tokens": 400}


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


@pytest.mark.parametrize(
    ("require_key", "whom"), [("auto", "only this machine is served"), ("true", "nobody is served")]
)
def test_a_server_without_keys_says_at_start_whom_it_serves(
    tokenizer: Tokenizer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    require_key: str,
    whom: str,
) -> None:
    for keys, told in ((0, True), (1, False)):
        capfd.readouterr()
        with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key=require_key) as rig:
            assert (whom in capfd.readouterr().err) is told, keys
            rig.key("first")
