"""A server with real models, in a child process."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.process.child import LISTENER, Child
from tests.support.paths import ROOT

CHAT_MODEL, EMBEDDING_MODEL = "smollm2-135m-instruct", "all-minilm-l6-v2"
READY_SECONDS = 400.0


class Process:
    """A server in a process of its own.

    Attributes:
        address: ``host:port``.
        log: what it wrote.
        popen: the process.
    """

    def __init__(self, command: list[str], settings: dict[str, str], log: Path) -> None:
        variables = environment({"INFERNEO_LOG_FORMAT": "json"} | settings)
        self._child = Child(command, variables, log_file=log)
        self.url, self.popen, self.log = self._child.url, self._child.process, log
        self.address = self.url.removeprefix("http://")
        self.ws = f"ws://{self.address}"

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Return once it can serve."""
        failure = self._child.wait("/ready", seconds)
        assert failure is None, f"{failure}: {self.tail()}"

    def tail(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text()[-4000:]

    def family(self) -> list[psutil.Process]:
        """It and its children."""
        try:
            top = psutil.Process(self.popen.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill what is left of it and its children."""
        self._child.end(0.0)

    def memory(self) -> int:
        """Bytes of physical memory that it and its children have."""
        top = psutil.Process(self.popen.pid)
        return sum(each.memory_info().rss for each in (top, *top.children(recursive=True)))


@contextlib.contextmanager
def process(
    log: Path,
    settings: dict[str, str],
    app: str = "server.app:app",
    *,
    workers: int = 1,
    tracebacks: bool = False,
) -> Iterator[Process]:
    """A server of these settings; if it still runs at the end it must stop cleanly.

    With ``tracebacks`` its log may hold some.
    """
    command = [sys.executable, "-m", "hypercorn", "-w", str(workers), "-b", LISTENER, app]
    server = Process(command, settings, log)
    try:
        yield server
        if server.popen.poll() is None:
            server.popen.terminate()
            assert server.popen.wait(timeout=40) == 0, server.tail()
    finally:
        server.kill()
    assert tracebacks or "Traceback" not in log.read_text(), server.tail()


def free_address() -> str:
    """``host:port`` where nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def environment(settings: dict[str, str]) -> dict[str, str]:
    """Of a process with these settings and no others, and one device, as a user's machine has."""
    dropped = ("INFERNEO_", "XLA_FLAGS", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"PYTHONPATH": str(ROOT)} | settings


@contextlib.contextmanager
def real_server(checkpoints: Path, log: Path) -> Iterator[str]:
    """``host:port`` of a server with reference numerics, ready.

    At the end it must hold nothing, have compiled nothing after it was ready, and stop cleanly.
    """
    settings = {
        "INFERNEO_CHECKPOINTS": str(checkpoints),
        "INFERNEO_DTYPE": "float32",
        "INFERNEO_SLOTS": "16",
    }
    with process(log, settings) as server:
        server.wait_ready()
        yield server.address
        check_empty(server.address)
        assert stats_of(server.address)["compiles_after_ready"] == 0


def stats_of(address: str, model: str = CHAT_MODEL) -> dict[str, Any]:
    """What the server says about its chat model."""
    models = httpx.get(f"http://{address}/ready").json()["models"]
    return next(each for each in models if each["id"] == model)


def check_empty(address: str, model: str = CHAT_MODEL) -> None:
    """Nothing of it may be held by a request."""
    stats = stats_of(address, model)
    assert (stats["slots_used"], stats["pages_used"], stats["waiting"]) == (0, 0, 0)
