"""nginx and Caddy as docs/deploy has them: tokens pass when they come, and the keys hold."""

import getpass
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from server.config.settings import Settings
from tests.deploy.files import DEPLOY, check
from tests.support.fake_server import CHAT, Rig, make_tokenizer, running
from tests.support.programs import program
from tests.support.raw_http import event_of
from tests.support.server_process import free_address
from tests.support.waiting import until

NAME = "inferneo.example.com"
TIMEOUT = 10.0
BODY = {"model": CHAT, "prompt": "abc", "max_tokens": 8, "stream": True}
Proxy = Callable[[Rig], AbstractContextManager[httpx.Client]]


def nginx(upstream: str, address: str, folder: Path) -> list[str]:
    """The command; without TLS, whose certificate is the operator's."""
    site = (DEPLOY / "nginx.conf").read_text()
    site = re.sub(r"^ *(listen|ssl_certificate).*\n", "", site, flags=re.MULTILINE)
    site = site.replace(f"server_name {NAME};", f"listen {address}; server_name {NAME};")
    assert "127.0.0.1:8000" in site
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"user {getpass.getuser()}; daemon off; pid {folder}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n"
        f"{site.replace('127.0.0.1:8000', upstream)}}}\n"
    )
    command = [program("nginx"), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    check(*command, "-t")
    return command


def caddy(upstream: str, address: str, folder: Path) -> list[str]:
    site = (DEPLOY / "Caddyfile").read_text()
    assert "127.0.0.1:8000" in site
    port = address.rpartition(":")[2]
    site = site.replace(f"{NAME} {{", f"http://{NAME}:{port} {{\n\tbind 127.0.0.1")
    (folder / "Caddyfile").write_text(
        "{\n\tadmin off\n}\n" + site.replace("127.0.0.1:8000", upstream)
    )
    command = [program("caddy"), "run", "--adapter", "caddyfile"]
    return [*command, "--config", str(folder / "Caddyfile")]


@pytest.fixture(scope="module", params=[nginx, caddy], ids=["nginx", "caddy"])
def proxied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    @contextmanager
    def start(rig: Rig) -> Iterator[httpx.Client]:
        folder, address = tmp_path_factory.mktemp("proxy"), free_address()
        command = request.param(rig.url.removeprefix("http://"), address, folder)
        with (folder / "log").open("w") as log:
            environment = {"HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/bin"}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            headers = {"Host": NAME}
            with httpx.Client(
                base_url=f"http://{address}", headers=headers, timeout=TIMEOUT
            ) as client:
                until(lambda: answers(client), TIMEOUT, (folder / "log").read_text)
                yield client
        finally:
            process.terminate()
            process.wait(TIMEOUT)

    return start


@pytest.fixture(scope="module")
def opened(proxied: Proxy) -> Iterator[tuple[Rig, httpx.Client]]:
    """A server that asks for no key, and a client of its proxy."""
    with running(make_tokenizer(), require_key="false") as rig, proxied(rig) as client:
        yield rig, client


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_tokens_pass_when_they_come_and_the_rest_stays_inside(
    opened: tuple[Rig, httpx.Client],
) -> None:
    rig, client = opened
    rig.engine.limit = 1
    with client.stream("POST", "/v1/completions", json=BODY) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        # The engine goes on once its first token is here: one held back would never come.
        assert event_of(next(lines))["choices"][0]["text"] == "C"
        rig.engine.release()
        assert list(lines)[-1] == "data: [DONE]"
    for path in ("/metrics", "/admin/keys"):
        assert rig.client.get(path).status_code != 404
        assert client.get(path).status_code == 404
    most = Settings.model_fields["max_body_bytes"].default
    for size, status in ((most, 400), (most + 1, 413)):  # no JSON; too large
        response = client.post(
            "/v1/completions",
            content=b" " * size,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == status


def test_websockets_pass(opened: tuple[Rig, httpx.Client]) -> None:
    _, client = opened
    host, port = client.base_url.host, client.base_url.port
    connection = socket.create_connection((host, port))
    with connect(f"ws://{NAME}:{port}/v1/completions", sock=connection) as ws:
        ws.send(json.dumps(BODY))
        assert "choices" in json.loads(ws.recv(timeout=TIMEOUT))


def test_who_comes_through_a_proxy_needs_a_key_from_the_first_day(proxied: Proxy) -> None:
    with running(make_tokenizer()) as rig, proxied(rig) as client:
        assert rig.client.get("/v1/models").status_code == 200
        refused = client.get("/v1/models")
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "local_only"
