"""Whom a server serves that has no keys, or asks for none."""

from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.sync.client import connect

from inferneo_jax import Tokenizer
from server.app import create_app
from server.config.settings import Settings
from server.keys.key import new_text
from tests.keys.admins import CHATS
from tests.support.keyed_server import KeyRig, bearer, key_rig

LOCAL_HOSTS = (
    *("localhost", "localhost:1", "LOCALHOST", "localhost.", "a.localhost", "a.b.localhost:80"),
    *("127.0.0.1", "127.0.0.1:8000", "127.1.2.3", "[::1]", "[::1]:1", "[::ffff:127.0.0.1]"),
)
FOREIGN_HOSTS = (
    *("", ":80", "rebound.example", "localhost.evil.example:80", "localhost.evil", "notlocalhost"),
    *("workshop", "inferneo:8000", "localhost-", "local_host", "-", "1", "x" * 63),
    *("0.0.0.0", "192.0.2.1", "127.0.0.1.evil.example", "[2001:db8::1]", "[::ffff:192.0.2.1]"),
    *("[::]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1"),
)
PROXY_HEADERS = (
    *("Forwarded", "Via", "CDN-Loop", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"),
    *("X-Forwarded", "X-Forwarded-Client-Cert", "x_forwarded_for", "Forwarded-For", "X-Real-IP"),
    *("X-Client-IP", "Client-IP", "True-Client-IP", "X-Cluster-Client-IP", "WL-Proxy-Client-IP"),
    *("CF-Connecting-IP", "CF-Ray", "Fastly-Client-IP", "Fly-Client-IP", "X-Remote-IP"),
    *("X-Remote-Addr", "X-Originating-IP", "X-ProxyUser-Ip", "X-Sucuri-ClientIP", "X-Host"),
    *("X-Original-URL", "X-Original-Host", "X-Original-Forwarded-For", "X-Rewrite-URL"),
    *("X-Envoy-External-Address", "X-AppEngine-User-IP", "X-Azure-ClientIP", "X-ARR-SSL"),
    *("Tailscale-User-Login", "X-Amz-Cf-Id", "Akamai-Origin-Hop", "X-Scheme", "Front-End-Https"),
)
CLIENT_HEADERS = (
    *("User-Agent", "Accept", "X-Stainless-Lang", "X-Stainless-Retry-Count", "OpenAI-Organization"),
    *("X-Request-Id", "Traceparent", "Tracestate", "Baggage", "X-Amzn-Trace-Id", "X-Cloud-Trace"),
    *("Sec-Fetch-Site", "Referer", "Origin", "Cookie", "X-OpenWebUI-User-Name", "DNT", "Priority"),
)


@pytest.fixture
def keyless(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    with key_rig(tokenizer, str(tmp_path / "keys.db")) as found:
        yield found


def test_without_keys_only_this_machine_is_served(keyless: KeyRig) -> None:
    def status(**headers: str) -> int:
        return keyless.client.get("/v1/models", headers=headers).status_code

    assert status() == status(Authorization="Bearer unused") == 200
    for host in LOCAL_HOSTS:
        assert status(Host=host) == 200, host
    for host in FOREIGN_HOSTS:
        response = keyless.client.get("/v1/models", headers={"Host": host})
        assert response.status_code == 403, host
        error = response.json()["error"]
        assert error["code"] == "local_only"
        assert repr(host) in error["message"]
        assert "INFERNEO_ALLOWED_HOSTS" in error["message"]
        assert "inferneo keys create" in error["message"]
    for name in PROXY_HEADERS:
        response = keyless.client.get("/v1/models", headers={name: "192.0.2.1"})
        assert response.status_code == 403, name
        assert f"the header {name}".lower() in response.json()["error"]["message"].lower()
        with pytest.raises(websockets.InvalidStatus):
            connect(keyless.ws + CHATS, additional_headers={name: "192.0.2.1"})
    for name in CLIENT_HEADERS:
        assert status(**{name: "1"}) == 200, name
    assert not Path(keyless.location).exists()
    assert keyless.client.get("/v1/usage").status_code == 400


def test_the_first_key_closes_the_server_at_once(keyless: KeyRig) -> None:
    assert keyless.client.get("/v1/models").status_code == 200
    headers = keyless.headers()
    assert keyless.client.get("/v1/models").status_code == 401
    assert keyless.client.get("/v1/models", headers=headers).status_code == 200
    Path(keyless.location).unlink()
    assert keyless.client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("end", ["server", "client"])
async def test_an_address_of_another_network_is_not_served_without_keys(
    tmp_path: Path, end: str
) -> None:
    app = create_app(Settings(keys_db=str(tmp_path / "keys.db")))
    for address, status in (
        (("192.0.2.1", 80), 403),
        (("::ffff:127.0.0.1", 80), 503),
        (("::ffff:192.0.2.1", 80), 403),
        (("/run/socket", None), 503),
        (None, 503),
        (("2001:db8::1", 80), 403),
        (("127.0.0.2", 80), 503),
    ):
        client = app.test_client()
        response = await client.get(
            "/v1/models", headers={"Host": "localhost"}, scope_base={end: address}
        )
        assert response.status_code == status, address


def test_without_keys_a_name_without_a_dot_may_be_listed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One with a dot may be what a proxy serves everybody under."""
    hosts = ("workshop", "api.example", "localhost")
    with key_rig(tokenizer, str(tmp_path / "keys.db"), allowed_hosts=hosts) as rig:
        for host, status in (
            ("workshop:8000", 200),
            ("localhost", 200),
            ("127.0.0.1", 403),
            ("api.example", 403),
            ("other", 403),
        ):
            assert rig.client.get("/v1/models", headers={"Host": host}).status_code == status, host


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
