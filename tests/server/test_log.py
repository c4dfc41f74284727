"""Logs say what happened, and nothing of what was said."""

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from server import log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    engine = logging.getLogger("inferneo_jax")
    kept = (engine.handlers, engine.propagate, engine.level)
    yield
    engine.handlers, engine.propagate, level = kept
    engine.setLevel(level)
    structlog.reset_defaults()


def _fail_with_a_prompt() -> None:
    prompt = "my secret prompt"
    raise RuntimeError(f"of {len(prompt)} characters")


@pytest.mark.parametrize("form", ["json", "console"])
def test_tracebacks_show_no_local_variables(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(form)
    for logger in (logging.getLogger("inferneo_jax.engine"), structlog.get_logger()):
        try:
            _fail_with_a_prompt()
        except RuntimeError:
            logger.exception("it failed")
    written = capsys.readouterr().err
    assert written.count("of 16 characters") == 2
    assert "my secret prompt" not in written


def test_json_lines_are_one_object_each(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    logging.getLogger("inferneo_jax.engine").warning("the sink of request %s raised", "x")
    structlog.get_logger().info("request", status=200)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["event"]) == ("warning", "the sink of request x raised")
    assert (second["level"], second["status"]) == ("info", 200)


def test_the_manual_names_every_event() -> None:
    root = Path(__file__).parents[2]
    manual = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    logging = {"info", "warning", "error", "exception"}
    events = {
        node.args[0].value
        for file in (root / "server").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in logging
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
        and re.fullmatch(r"[a-z]+(_[a-z]+)*", node.args[0].value)
    }
    assert len(events) > 15
    assert not {event for event in events if f"`{event}`" not in manual}
