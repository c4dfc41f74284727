"""`inferneo serve`: its flags, what it shows, and how it ends."""

import io
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from inferneo_jax import InferneoError
from server.cli.main import app
from server.cli.progress import ModelProgress
from server.config.schema import setting_docs
from tests.support.fake_server import Rig
from tests.support.machine_speed import Machine
from tests.support.paths import ROOT
from tests.support.server_process import environment
from tests.support.terminal import Terminal

FAKES = [sys.executable, "-m", "tests.support.serve_fakes"]
SECONDS = 30.0


def settings(tmp_path: Path, **changes: str) -> dict[str, str]:
    own = {
        "INFERNEO_KEYS_DB": str(tmp_path / "keys.db"),
        "INFERNEO_CHECKPOINTS": str(tmp_path),
        "INFERNEO_PORT": "0",
    }
    return environment(own | changes)


def test_help_shows_every_flag_and_default() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "400"}).output
    for setting in setting_docs():
        if setting.flag:
            line = next(line for line in shown.splitlines() if f"{setting.flag} " in line)
            assert f" {setting.form} " in line
        if setting.name not in ("job_token", "prefill_token"):
            assert setting.default in shown, setting
            assert setting.description.split(".")[0] in shown, setting
    assert "--job-token" not in shown
    assert "--prefill-token" not in shown
    assert "inferneo serve --config inferneo.toml" in shown


def test_a_terminal_sees_how_it_loads_and_where_it_is(tmp_path: Path) -> None:
    with Terminal(FAKES, settings(tmp_path)) as shown:
        url = shown.wait_for(r"at (http://127\.0\.0\.1:\d+)")[1]
        shown.wait_for("Ctrl-C ends it")
        text = shown.text
        assert "org/tiny-chat" in text
        for words in (
            "ready after",
            f"{url}/ ",
            f"{url}/dashboard ",
            f"{url}/v1 ",
            f"{url}/docs ",
            "org/tiny-chat (chat), tiny-embed (embeddings)",
            "none yet, so only this machine is served; inferneo keys create",
        ):
            assert words in text
        assert "loading" not in text  # the log's words for it
        assert max(map(len, re.split("[\r\n]+", text))) <= 80
        assert httpx.get(f"{url}/v1/models").status_code == 200
        shown.wait_for("route=/v1/models")
        shown.popen.send_signal(signal.SIGINT)
        shown.wait_for("Ending: requests that run have 25 s")
        assert shown.ended() == 0
        assert "Traceback" not in shown.text


def test_progress_says_what_is_done_and_how_far() -> None:
    rows = [
        {"id": "a" * 60, "stage": "downloading", "done": 25_000_000, "total": 93_000_000},
        {"id": "b", "stage": "compile", "done": 3, "total": 19},
        {"id": "c", "stage": "ready", "done": 1, "total": 1},
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with ModelProgress(console, lambda: rows):
        pass
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", console.file.getvalue())
    first, second, third, _ = text.split("\n")[:4]
    assert "downloading" in first
    assert first.rstrip().endswith("25 of 93 MB")
    assert re.search(r"b +compiling programs +\S+ +3 of 19", second)
    assert re.search("c +ready", third)
    assert max(map(len, re.split("[\r\n]", text))) <= 80
    quiet = Console(file=io.StringIO(), width=80)
    with ModelProgress(quiet, lambda: rows):
        pass
    assert quiet.file.getvalue() == ""


def test_ctrl_c_twice_ends_at_once(tmp_path: Path, machine: Machine) -> None:
    with Terminal(FAKES, settings(tmp_path)) as shown:
        url = shown.wait_for(r"at (http\S+)")[1]
        body = {"model": "org/tiny-chat", "prompt": "x", "max_tokens": 9, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            parts = response.iter_bytes()
            next(parts)  # the fake says no more, and whoever lets go of them has gone
            shown.popen.send_signal(signal.SIGINT)
            shown.wait_for("Ctrl-C again ends at once")
            told = time.monotonic()
            while shown.popen.poll() is None:
                shown.popen.send_signal(signal.SIGINT)
                time.sleep(0.1)
            assert time.monotonic() - told < machine.seconds(5)
        assert shown.ended() == -signal.SIGINT, shown.text


def test_what_failed_is_told_on_a_terminal_and_elsewhere(tmp_path: Path) -> None:
    env = settings(tmp_path, FAKES="broken")
    with Terminal(FAKES, env) as shown:
        shown.wait_for("broken: 9 MB; from a hub")
        shown.wait_for("error: broken: its weights cannot be read; pull it again")
        assert shown.ended() == 1
    done = subprocess.run(FAKES, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert "loading_failed" in done.stderr
    assert '"what": "9 MB; from a hub"' in done.stderr
    assert "broken: its weights cannot be read" in done.stderr
    assert "Traceback" not in shown.text + done.stderr


@pytest.mark.parametrize("workers", ["0", "1"])
def test_wrong_settings_end_the_server_with_a_sentence_under_hypercorn_too(workers: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hypercorn", "-w", workers, "-b", "127.0.0.1:0", "server.app:app"],
        cwd=ROOT,
        env=environment({"INFERNEO_SLOTS": "many"}),
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "INFERNEO_SLOTS is 'many'; it must be an integer." in result.stderr
    assert "Traceback" not in result.stderr


def test_elsewhere_it_logs_and_drains(tmp_path: Path) -> None:
    env = settings(tmp_path, INFERNEO_DRAIN_SECONDS="0.5")
    process = subprocess.Popen(FAKES, stderr=subprocess.PIPE, text=True, env=env)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if '"event": "ready"' in line:
                break
        url = re.search(r"http://[0-9.]+:\d+", "".join(lines))[0]
        body = {"model": "org/tiny-chat", "prompt": "x", "max_tokens": 9, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            parts = response.iter_text()
            next(parts)
            process.send_signal(signal.SIGTERM)
            assert "overloaded" in "".join(parts)  # told, not cut
        rest = process.communicate(timeout=SECONDS)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, rest
    assert '"event": "draining"' in rest


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "nosuch"],
        env=settings(tmp_path),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "no model 'nosuch' in the catalog; there are smollm2-135m-instruct" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named_with_who_has_it(rig: Rig, tmp_path: Path) -> None:
    def said(port: int) -> str:
        arguments = ["serve", "--port", str(port)]
        done = CliRunner().invoke(app, arguments, env={"INFERNEO_CHECKPOINTS": str(tmp_path)})
        assert isinstance(done.exception, InferneoError)
        assert f"port {port} of 127.0.0.1 is taken by " in str(done.exception)
        return str(done.exception)

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        message = said(other.getsockname()[1])
    assert "taken by another program" in message
    assert "--port 0" in message
    assert "taken by an Inferneo server, which is ready" in said(rig.server.port)
