"""The server on the real models, in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

CHAT_MODEL, EMBEDDING_MODEL = "smollm2-135m-instruct", "all-minilm-l6-v2"
READY_SECONDS = 400.0


@contextlib.contextmanager
def real_server(checkpoints: Path, log: Path) -> Iterator[str]:
    """``host:port`` of a server with reference numerics, ready.

    At the end it must hold nothing, have compiled nothing after it was ready, and stop cleanly.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "INFERNEO_CHECKPOINTS": str(checkpoints),
        "INFERNEO_DTYPE": "float32",
        "INFERNEO_SLOTS": "16",
        "INFERNEO_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "hypercorn", "-b", address, "server.app:app"]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
        stats = stats_of(address)
        assert (stats["slots_used"], stats["pages_used"]) == (0, 0)
        assert stats["compiles_after_ready"] == 0
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in log.read_text()


def stats_of(address: str) -> dict[str, Any]:
    """What the server says about its chat model."""
    models = httpx.get(f"http://{address}/ready").json()["models"]
    return next(model for model in models if model["id"] == CHAT_MODEL)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/ready").status_code == 200
    except httpx.TransportError:
        return False
