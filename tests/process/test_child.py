"""Servers that another command starts: they race for no port, leave no folder, and end with it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from server import notebook
from server.process.child import LISTENER, PORT, Child
from tests.support.paths import ROOT
from tests.support.waiting import until_gone

SERVER = """
import http.server, os, signal, socket, sys
listens, *more = sys.argv[1:]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "loading" in more else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

if "deaf" in more:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "taken" in more:
    with open(more[-1], "a") as starts:
        starts.write(listens + "\\n")
    if len(open(more[-1]).readlines()) <= int(more[1]):
        sys.exit("OSError: [Errno 98] Address already in use")
if "wrong" in more:
    sys.exit("there is no such model")
if listens.startswith("fd://"):
    server = http.server.HTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket = socket.socket(fileno=int(listens[5:]))
else:
    server = http.server.HTTPServer(("127.0.0.1", int(listens)), Handler)
print("serves with", os.getpid(), flush=True)
server.serve_forever()
"""
KERNEL = """
import sys, time
from server import notebook
notebook.OURS = (sys.executable, "-c", sys.argv[1], "{listener}")
server = notebook.Server()
print(server.log.partition("serves with ")[2].split()[0], flush=True)
time.sleep(600)
"""


def command(listens: str, *more: str) -> tuple[str, ...]:
    return (sys.executable, "-c", SERVER, listens, *more)


def port_of(child: Child) -> int:
    return int(child.url.rpartition(":")[2])


def pid_of(log: str) -> int:
    return int(log.partition("serves with ")[2].split()[0])


def test_the_port_of_a_server_is_taken_before_it_is_started() -> None:
    child = Child(command(LISTENER))
    try:
        # Whether or not the process has got as far as to serve.
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port_of(child)))
        assert child.wait("/ready", 60) is None
    finally:
        child.end()
    socket.create_server(("127.0.0.1", port_of(child))).close()  # nobody holds it any more


@pytest.mark.parametrize(("times", "starts"), [(0, 1), (1, 2), (2, 3), (9, 3)])
def test_a_peer_whose_port_was_taken_is_started_on_another(
    tmp_path: Path, times: int, starts: int
) -> None:
    told = tmp_path / "starts"
    child = Child(command(PORT, "taken", str(times), str(told)))
    try:
        failure = child.wait("/ready", 60)
        assert child.is_running is (times < 3)
    finally:
        child.end()
    assert failure == (None if times < 3 else "ended with 1 before it was ready")
    ports = told.read_text().split()
    assert len(ports) == starts
    assert ports[-1] == str(port_of(child))
    assert ("Address already in use" in child.log) is (times == 9)


def test_a_server_that_ends_for_another_reason_is_not_started_again() -> None:
    child = Child(command(PORT, "wrong"))
    try:
        assert child.wait("/ready", 60) == "ended with 1 before it was ready"
    finally:
        child.end()
    assert child.log.count("there is no such model") == 1


def test_a_port_that_was_chosen_and_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        Child(command(LISTENER), port=other.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files and folders are made meanwhile."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_notebooks_server_leaves_no_folder_and_its_log_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "OURS", command(LISTENER))
    with notebook.Server() as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.url.endswith("/v1")
        said = server.log
        assert "serves with" in said
    assert server.log.startswith(said)
    server.stop()  # once more does no harm
    until_gone(pid_of(said))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wrong", "the server ended with 1 before it was ready:\nthere is no such model"),
        ("loading", r"the server was not ready within 0\.5 s:\n"),
    ],
)
def test_a_notebooks_server_that_does_not_start_shows_its_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    monkeypatch.setattr(notebook, "OURS", command(LISTENER, how))
    before = {*psutil.Process().children()}
    with pytest.raises(RuntimeError, match=message):
        notebook.Server(timeout=0.5 if how == "loading" else 60.0)
    assert {*psutil.Process().children()} <= before
    assert list(folder.iterdir()) == []


def test_a_notebooks_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "OURS", command(LISTENER, "deaf"))
    monkeypatch.setattr(notebook, "END_SECONDS", 0.1)
    monkeypatch.setattr(notebook, "_SLACK_SECONDS", 0.1)
    server = notebook.Server(drain_seconds=0.2)
    server.stop()
    until_gone(pid_of(server.log))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of a killed parent")
def test_a_notebooks_server_ends_with_a_killed_kernel() -> None:
    kernel = subprocess.Popen(
        [sys.executable, "-c", KERNEL, SERVER],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert kernel.stdout is not None
    pid = int(kernel.stdout.readline())
    kernel.send_signal(signal.SIGKILL)
    kernel.wait(20)
    kernel.stdout.close()
    until_gone(pid)
