"""``inferneo chat`` as a process: on a terminal, in a pipe, and beside no server."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inferneo_jax import Tokenizer
from server.cli.main import app
from tests.support.fake_server import CHAT, REPLY, Rig
from tests.support.keyed_server import key_rig
from tests.support.paths import ROOT
from tests.support.terminal import Terminal

COMMAND = [sys.executable, "-m", "server.cli", "chat"]


def environment(tmp_path: Path) -> dict[str, str]:
    # Nobody answers where the cursor is.
    return os.environ | {"XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}


def run(tmp_path: Path, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    env = environment(tmp_path) | options.pop("env", {})
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=env, **options)


def run_here(*arguments: str, **env: str) -> Result:
    """The same in this process."""
    return CliRunner().invoke(app, ["chat", *arguments], env=env)


def test_on_a_terminal_an_answer_streams_and_ctrl_c_stops_it(rig: Rig, tmp_path: Path) -> None:
    rig.engine.limit = 8
    with Terminal([*COMMAND, "--url", rig.url], environment(tmp_path)) as terminal:
        terminal.wait_for(re.escape(f"{CHAT} at {rig.url}"))
        terminal.wait_for("> ")
        terminal.type("Hello?\r")
        terminal.wait_for("Caf\u00e9 au")  # while the answer goes on
        rig.engine.wait_until(lambda e: e.num_running == 1)
        terminal.type("\x03")
        terminal.wait_for("stopped")
        rig.engine.wait_until(lambda e: len(e.aborted) == 1)
        rig.engine.release()
        terminal.wait_for("> ")
        terminal.type("/retry\r")
        terminal.wait_for("END of it.")
        terminal.wait_for("complete")
        terminal.wait_for("> ")
        terminal.type("\x1b[A\x1b[A")  # up, past /retry
        terminal.wait_for("Hello\\?")
        terminal.type("\x15/und")  # Ctrl-U empties the line
        terminal.wait_for("/und")
        terminal.type("\t")
        terminal.wait_for("o")
        terminal.type("\r")
        terminal.wait_for("Taken back: Hello\\?")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0


def test_a_key_is_asked_for_and_not_shown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="true") as rig,
        Terminal([*COMMAND, "--url", rig.url], environment(tmp_path)) as terminal,
    ):
        key = rig.key()[1]
        for text in ("wrong", key):
            terminal.wait_for("error: .*\r\n")
            terminal.wait_for("API key: ")
            terminal.type(f"{text}\r")
        terminal.wait_for("/help shows")
        terminal.wait_for("> ")
        terminal.type("Hello?\r")
        terminal.wait_for("END of it.")
    assert "wrong" not in terminal.text
    assert key not in terminal.text


def test_one_question_prints_its_answer_and_nothing_else(rig: Rig, tmp_path: Path) -> None:
    options = ["--url", rig.url, CHAT, "--set", "temperature=0", "--set", "seed=3"]
    piped = run(tmp_path, *options, input="Hello?\n")
    assert (piped.returncode, piped.stderr, piped.stdout) == (0, "", f"{REPLY}\n")
    given = run_here(*options, "-m", "Hello?")
    assert (given.exit_code, given.stderr, given.stdout) == (0, "", f"{REPLY}\n")
    assert len(rig.engine.submitted) == 2
    for request in rig.engine.submitted:
        assert (request.sampling.temperature, request.sampling.seed) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "The model 'none' does not exist"),
        (["--set", "top_k=-2"], "top_k is -2; it must be at least -1."),
        (["--set", "top_k"], "is to be NAME=VALUE"),
        (["-m", " "], "There is no question"),
        (["--url", "http://127.0.0.1:1"], "No server answers at http://127.0.0.1:1"),
    ],
)
def test_what_fails_is_said_on_standard_error(rig: Rig, arguments: list[str], message: str) -> None:
    result = run_here("--url", rig.url, "-m", "Hello?", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in " ".join(result.stderr.split())


def test_the_settings_say_where_the_server_is(rig: Rig) -> None:
    port = rig.url.rpartition(":")[2]
    result = run_here("-m", "Hello?", INFERNEO_HOST="0.0.0.0", INFERNEO_PORT=port)
    assert (result.exit_code, result.stdout) == (0, f"{REPLY}\n")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # it does not listen, and nobody else can here
        port = str(closed.getsockname()[1])
        result = run(tmp_path, str(folder), "-m", "Hello?", env={"INFERNEO_PORT": port})
    assert (result.returncode, result.stdout) == (1, "")
    assert f"No server answers at http://127.0.0.1:{port}: one is started" in result.stderr
    assert "The server ended before it was ready" in result.stderr
    assert "is no model folder: it has no config.json" in " ".join(result.stderr.split())
