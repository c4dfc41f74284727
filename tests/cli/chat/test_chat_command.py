"""``inferneo chat`` as a process: on a terminal, in a pipe, and beside no server."""

import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_server import CHAT, REPLY, Rig
from tests.support.keyed_server import key_rig
from tests.support.paths import ROOT

COMMAND = [sys.executable, "-m", "server.cli", "chat"]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "XDG_STATE_HOME": str(tmp_path),
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers where the cursor is
        "TERM": "xterm",
        **more,
    }


def run(tmp_path: Path, *arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    more = options.pop("env", {})
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(tmp_path, **more),  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **{"stdin": subprocess.DEVNULL} if "input" not in options else {},
        **options,
    )


class Terminal:
    """A process on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str, tmp_path: Path) -> None:
        self._end, other = pty.openpty()
        self._process = subprocess.Popen(
            # The first of a session that opens a terminal is controlled by it.
            ["sh", "-c", ': < "$(tty)"; exec "$@"', "sh", *COMMAND, *arguments],
            cwd=ROOT,
            env=environment(tmp_path, COLUMNS="80", LINES="24"),
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self.seen = self.all = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30.0) -> None:
        """Wait until what came since the last time has it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.seen!r}"
            if select.select([self._end], [], [], left)[0]:
                piece = os.read(self._end, 65_536).decode(errors="replace")
                self.seen, self.all = self.seen + piece, self.all + piece
        self.seen = self.seen[match.end() :]

    def wait(self) -> int:
        return self._process.wait(30)


def test_on_a_terminal_an_answer_streams_and_ctrl_c_stops_it(rig: Rig, tmp_path: Path) -> None:
    rig.engine.limit = 8
    with Terminal("--url", rig.url, tmp_path=tmp_path) as terminal:
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
        terminal.type("\x15")  # Ctrl-U empties the line
        terminal.wait_for(r"\x1b\[K")
        terminal.type("/und\t")
        terminal.wait_for("/und.*o")
        terminal.type("\r")
        terminal.wait_for("Taken back: Hello\\?")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_a_key_is_asked_for_and_not_shown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="true") as rig,
        Terminal("--url", rig.url, tmp_path=tmp_path) as terminal,
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
    assert "wrong" not in terminal.all
    assert key not in terminal.all


@pytest.mark.parametrize("piped", [True, False])
def test_one_question_prints_its_answer_and_nothing_else(
    rig: Rig, tmp_path: Path, piped: bool
) -> None:
    options = ["--url", rig.url, CHAT, "--set", "temperature=0", "--set", "seed=3"]
    if piped:
        result = run(tmp_path, *options, input="Hello?\n")
    else:
        result = run(tmp_path, *options, "-m", "Hello?")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"{REPLY}\n")
    request = rig.engine.submitted[-1]
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
def test_what_fails_is_said_on_standard_error(
    rig: Rig, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tmp_path, "--url", rig.url, "-m", "Hello?", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in " ".join(result.stderr.split())


def test_the_settings_say_where_the_server_is(rig: Rig, tmp_path: Path) -> None:
    env = {"INFERNEO_HOST": "0.0.0.0", "INFERNEO_PORT": rig.url.rpartition(":")[2]}
    result = run(tmp_path, "-m", "Hello?", env=env)
    assert (result.returncode, result.stdout) == (0, f"{REPLY}\n")


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
    assert "holds no converted model" in result.stderr
