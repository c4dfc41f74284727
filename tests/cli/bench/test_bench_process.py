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
from tests.support.waiting import until_gone

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
signal.signal(signal.SIGTERM, lambda *_: (child.terminate(), os._exit(0)))
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


@pytest.mark.parametrize("how", ["raise", "SIGINT", "SIGTERM", "SIGHUP"])
def test_no_server_outlives_the_benchmark(how: str) -> None:
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
    until_gone(*pids)


@pytest.mark.parametrize(
    ("command", "seconds", "message"),
    [
        (
            (sys.executable, "-c", "import sys; sys.exit('no such model: {port}')"),
            60.0,
            r"peer ended with 1 .*\n.*no such model: \d+",
        ),
        (
            (sys.executable, "-c", "import time; time.sleep(600)"),
            0.3,
            r"peer was not ready within 0\.3 s",
        ),
        (("/nowhere/x",), 1.0, "/nowhere/x"),
    ],
)
def test_a_server_that_does_not_start_is_ended_and_shows_its_log(
    command: tuple[str, ...], seconds: float, message: str
) -> None:
    before = {*psutil.Process().children()}  # of other tests
    with (
        pytest.raises(BenchError, match=message),
        running(Side(label="peer", command=command), seconds),
    ):
        pass
    assert {*psutil.Process().children()} <= before
