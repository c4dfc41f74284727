"""Logs say what happened, and nothing of what was said."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog
from websockets import ConnectionClosed
from websockets.sync.client import connect

from inferneo_jax import Tokenizer
from server.observe import log
from tests.observe.collector import Kept
from tests.support.fake_server import CHAT, running
from tests.support.paths import ROOT

OF_REQUESTS = ("request", "websocket_request", "websocket")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("inferneo_jax", "opentelemetry")]
    kept = [(each.handlers, each.propagate, each.level) for each in loggers]
    yield
    for each, (each.handlers, each.propagate, level) in zip(loggers, kept, strict=True):
        each.setLevel(level)
    structlog.reset_defaults()


def _fail_with_a_prompt() -> None:
    prompt = "my secret prompt"
    raise RuntimeError(f"of {len(prompt)} characters")


@pytest.mark.parametrize("form", ["json", "console"])
def test_tracebacks_show_no_local_variables(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(form)
    for logger in (logging.getLogger("inferneo_jax.engine.engine"), structlog.get_logger()):
        try:
            _fail_with_a_prompt()
        except RuntimeError:
            logger.exception("it failed")
    written = capsys.readouterr().err
    assert written.count("of 16 characters") == 2
    assert "my secret prompt" not in written


def test_json_lines_are_one_object_each(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    logging.getLogger("inferneo_jax.engine.engine").warning("the sink of request %s raised", "x")
    structlog.get_logger().info("request", status=200)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["event"]) == ("warning", "the sink of request x raised")
    assert (second["level"], second["status"]) == ("info", 200)


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_client_writes_lines_of_its_own(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(form)
    user = "x\r\n\x1b[2J\u202e\u2028{}\x85ready"
    structlog.get_logger().info("request", user=user)
    logging.getLogger("inferneo_jax.engine.engine").warning("of %s", user)
    written = capsys.readouterr().err
    assert written.count("\n") == len(written.splitlines()) == 2
    assert not {"\r", "\x1b", "\u202e", "\u2028", "\x85"} & set(written)


def test_the_manual_names_every_event() -> None:
    root = ROOT
    page = (root / "docs" / "logs.md").read_text(encoding="utf-8")
    written = set()
    for file in (root / "server").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        written |= set(
            re.findall(r"\blog(?:ger)?\.(?:info|warning|error|exception)\(\s*\"([a-z_]+)\"", source)
        )
        written |= set(re.findall(r"entry\.write\(\"([a-z_]+)\"\)", source))
    assert "request" in written
    assert {name for name in written if f"`{name}`" not in page} == set()


def test_the_manual_names_every_field_of_a_request(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page.split("\n| `event` | `level`")[0], re.MULTILINE)
    named = set(re.findall(r"`([a-z_]+)`", " ".join(rows)))
    monkeypatch.setattr("server.application.open_tracing", Kept().tracing)
    body = {"model": CHAT, "prompt": "abc", "user": "u", "max_tokens": 3}
    with running(tokenizer) as rig:
        rig.post("/v1/completions", body)
        rig.post("/v1/completions", {"model": "none"})
        with connect(rig.ws + "/v1/completions") as socket:
            socket.send(json.dumps({"type": "request", "id": "mine", "body": body}))
            socket.recv()
            socket.socket.sendall(b"\x81\x02{}")  # which is not masked
            with suppress(ConnectionClosed):
                while True:
                    socket.recv(timeout=10)
        rig.engine.limit = 1
        with rig.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    fields = {name for line in lines if line["event"] in OF_REQUESTS for name in line}
    assert fields | {"key"} == named  # of a key there is none here
