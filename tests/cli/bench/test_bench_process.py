"""Servers that a benchmark starts end with it, however it ends."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from server.cli.bench.errors import BenchError
from server.cli.bench.peers import Side, running
from tests.support.paths import ROOT
from tests.support.waiting import until

SERVER = """
import http.server, os, signal, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"%d %d" % (os.getpid(), child.pid)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
stop = lambda *_: (child.terminate(), os._exit(0))
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else stop)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DRIVER = """
import signal, sys, time, urllib.request
from server.cli.bench.peers import Side
from server.cli.bench.peers import running, signals_end_it
# As in a terminal: what a shell starts in the background ignores it, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
side = Side(label="x", command=(sys.executable, "-c", sys.argv[1], "{port}"))
with signals_end_it(), running(side, 60.0) as (url, _):
    print(urllib.request.urlopen(url).read().decode(), flush=True)
    if sys.argv[2] == "raise":
        raise ValueError("on purpose")
    time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(*pids: int) -> None:
    until(lambda: all(map(gone, pids)), 20, lambda: "a server outlived the benchmark")


@pytest.mark.parametrize("how", ["raise", "SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_no_server_outlives_the_benchmark(how: str) -> None:
    if how == "SIGKILL" and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, SERVER, how],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2
    if how != "raise":
        driver.send_signal(getattr(signal, how))
    assert driver.wait(20) != 0
    driver.stdout.close()
    wait_gone(*pids)


def test_a_server_that_does_not_listen_to_signals_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.process.child.END_SECONDS", 0.3)
    side = Side(label="x", command=(sys.executable, "-c", SERVER, "{port}", "deaf"))
    before = {*psutil.Process().children()}  # of other tests
    with running(side, 60.0) as (_, took):
        (server,) = {*psutil.Process().children()} - before
        pids = [server.pid, *(child.pid for child in server.children())]
        assert len(pids) == 2
        assert took is not None
    wait_gone(*pids)


def test_a_server_that_cannot_start_shows_its_log() -> None:
    code = "import sys; sys.exit('no such model: {port}')"
    side = Side(label="peer", command=(sys.executable, "-c", code))
    with pytest.raises(BenchError, match=r"peer ended with 1 .*\n.*no such model: \d+"):  # noqa: SIM117
        with running(side, 60.0):
            pass


def test_a_server_that_is_never_ready_is_ended() -> None:
    before = {*psutil.Process().children()}
    side = Side(label="peer", command=(sys.executable, "-c", "import time; time.sleep(600)"))
    with pytest.raises(BenchError, match=r"peer was not ready within 0\.3 s"):  # noqa: SIM117
        with running(side, 0.3):
            pass
    assert {*psutil.Process().children()} <= before


def test_what_cannot_be_run_is_named() -> None:
    with pytest.raises(BenchError, match="/nowhere/x"):  # noqa: SIM117
        with running(Side(label="x", command=("/nowhere/x",)), 1.0):
            pass
