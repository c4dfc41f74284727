"""Dockerfile and compose file: what they say about the server is so."""

import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from inferneo_jax import __version__
from server.config.settings import PREFIX, Settings
from server.keys.store.open import open_store
from tests.deploy.files import DEPLOY, GOODBYE_SECONDS, SCRIPTS, check, read
from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
COMPOSE = read(ROOT / "compose.yaml")
SERVICES = COMPOSE["services"]


def instruction(name: str) -> str:
    """The last one of this name."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)[-1]


def variables() -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(instruction("ENV")))


def test_the_linter_has_nothing_to_say() -> None:
    assert check(SCRIPTS / "hadolint", ROOT / "Dockerfile") == ""


def test_the_image_holds_what_the_package_is_built_of_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    assert all((ROOT / path).exists() for path in kept)
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in ("inferneo_jax", "server", "checkpoints/catalog.toml", "README.md"):
        assert f'"{path}"' in config
        assert path in kept
    assert any(fnmatch("server/__pycache__", line) for line in lines if line[0] != "!")


def test_what_the_image_sets_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: value for name, value in variables().items() if name.startswith(PREFIX)}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert {PREFIX + name.upper() for name in settings.model_fields_set} == set(found)
    assert settings.require_key == "true"
    assert (settings.host, str(settings.port)) == ("0.0.0.0", instruction("EXPOSE"))
    volumes = re.findall(r'"(/\w+)"', instruction("VOLUME"))
    assert volumes == ["/models", "/cache", "/keys"]
    for path in (settings.checkpoints, settings.compilation_cache, settings.keys_db):
        assert any(Path(str(path)).is_relative_to(volume) for volume in volumes)
    assert variables()["XDG_CACHE_HOME"] in volumes


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_it_is_healthy_when_it_is_ready(status: int, healthy: bool, tmp_path: Path) -> None:
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', instruction("HEALTHCHECK"))
    assert words[:2] == ["python", "-c"]
    answering = f"""
import http.server, os, subprocess, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status} if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
port = {{"INFERNEO_PORT": str(server.server_port)}}
asked = subprocess.run([sys.executable, "-c", sys.argv[1]], env=os.environ | port)
sys.exit(asked.returncode)
"""
    done = subprocess.run([sys.executable, "-c", answering, words[2]], check=False)
    assert (done.returncode == 0) is healthy


def test_the_image_has_a_python_that_has_the_newest_jax() -> None:
    (tag,) = re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.MULTILINE)
    major, minor = map(int, re.findall(r"^(\d+)\.(\d+)-slim-", tag)[0])
    assert (major, minor) >= (3, 12)


def test_an_image_is_not_built_under_another_version() -> None:
    (written,) = re.findall(r"^RUN (written=.*)$", DOCKERFILE, re.MULTILINE)
    for version, good in ((__version__, True), ("dev", True), ("0.0.0", False)):
        done = subprocess.run(
            ["/bin/sh", "-c", written],
            cwd=ROOT,
            env=os.environ | {"VERSION": version, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
            capture_output=True,
            check=False,
        )
        assert (done.returncode == 0) is good, done.stderr


def test_every_variable_of_the_compose_file_is_a_setting() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for service in SERVICES.values():
        set_here = {n for n in service.get("environment", ()) if n.startswith(PREFIX)}
        assert set_here <= known


def test_the_server_has_time_to_drain() -> None:
    drain = float(SERVICES["server"]["environment"]["INFERNEO_DRAIN_SECONDS"])
    grace = float(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert drain + GOODBYE_SECONDS < grace


def test_no_port_is_open_to_other_machines_and_no_secret_is_written_down() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert re.match(r"(127\.0\.0\.1:|\$\{INFERNEO_BIND:-127\.0\.0\.1:)", port), name
        assert "no-new-privileges:true" in service["security_opt"]
        assert "mem_limit" in service or name == "scrape-key"
        assert not [n for n in service.get("environment", ()) if re.search("PASSWORD|TOKEN", n)]
    # Redis asks for no password: nothing but the server reaches it.
    assert SERVICES["redis"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"] == {"internal": True}
    on_it = {name for name, each in SERVICES.items() if "store" in each.get("networks", ())}
    assert on_it == {"server", "scrape-key", "redis"}


def test_what_is_mounted_is_there() -> None:
    mounted = {mount.split(":")[0] for each in SERVICES.values() for mount in each["volumes"]}
    folders = {source for source in mounted if source.startswith("./")}
    assert all((ROOT / folder).is_dir() for folder in folders)
    assert mounted - folders == set(COMPOSE["volumes"])


def test_the_key_for_prometheus_is_made_once(tmp_path: Path) -> None:
    shell, flags, script = SERVICES["scrape-key"]["command"]
    folder, store = tmp_path / "keys", tmp_path / "keys.db"
    folder.mkdir()
    script = script.replace("$$", "$").replace("/keys", str(folder))
    settings = {"INFERNEO_KEYS_DB": str(store), "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    texts = []
    for _ in range(2):
        assert check(shell, flags, script, env=os.environ | settings) == ""
        texts.append((folder / "key").read_text().strip())
    assert texts[0] == texts[1]
    assert (folder / "key").stat().st_mode & 0o777 == 0o444
    mounted = next(m for m in SERVICES["prometheus"]["volumes"] if m.startswith("scrape-key:"))
    job = read(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"][0]
    assert job["authorization"]["credentials_file"] == mounted.split(":")[1] + "/key"
    keys = open_store(str(store))
    (key,) = keys.list_keys()
    assert key.matches(keys.pepper(), texts[0])
    assert key.scopes == {"metrics"}
    keys.close()
