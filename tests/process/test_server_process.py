"""The server as a process: what an import does, exit codes, signals."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.paths import ROOT
from tests.support.server_process import environment

APP = """
import sys
sys.path.insert(0, {root!r})
from tests.support.fake_engine import FakeEmbedder, FakeEngine, writes
from tests.support.fake_server import make_tokenizer, models_of
from server.app import create_app
from server.config.settings import Settings

tokenizer = make_tokenizer()
engine = FakeEngine(writes(tokenizer, "x", end=False), limit=1)
models = models_of(engine, FakeEmbedder(), tokenizer)
app = create_app(Settings(models=tuple(models)), lambda source, *_: models[source.id]())
"""


def hypercorn(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hypercorn", *arguments]


def test_importing_the_app_brings_in_no_jax() -> None:
    code = (
        "import sys, server.app; "
        "print([m for m in ('jax', 'jaxlib', 'transformers', 'torch') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_wrong_settings_end_the_server_with_a_sentence(workers: str) -> None:
    result = subprocess.run(
        hypercorn("-w", workers, "-b", "127.0.0.1:0", "server.app:app"),
        cwd=ROOT,
        env=environment({"INFERNEO_SLOTS": "many"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "INFERNEO_SLOTS is 'many'; it must be an integer." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    result = subprocess.run(
        hypercorn("-b", "127.0.0.1:0", "server.app:app"),
        cwd=ROOT,
        env=environment({"INFERNEO_MODELS": str(tmp_path), "INFERNEO_LOG_FORMAT": "json"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "loading_failed" in result.stderr
    assert tmp_path.name in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_the_server_cleanly(tmp_path: Path, workers: str, busy: bool) -> None:
    (tmp_path / "fake_app.py").write_text(APP.format(root=str(ROOT)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        hypercorn(
            "-w", workers, "-b", f"127.0.0.1:{port}", "--graceful-timeout", "1", "fake_app:app"
        ),
        cwd=tmp_path,
        env=environment({"INFERNEO_DRAIN_SECONDS": "0.5"}),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        transport = httpx.HTTPTransport(retries=20)  # waits longer each time
        with httpx.Client(base_url=url, transport=transport) as client:
            while client.get("/ready").status_code != 200:
                pass
            if busy:
                body = {"model": "org/tiny-chat", "prompt": "x", "max_tokens": 9, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as response:
                    parts = response.iter_bytes()  # kept: without it the connection is closed
                    assert next(parts)
                    process.send_signal(signal.SIGTERM)
                    process.wait(20)
                    assert b"".join(parts).endswith(b"data: [DONE]\n\n")
            else:
                process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=20)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert busy or "Traceback" not in errors
