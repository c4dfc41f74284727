"""Servers in child processes, which never outlive the process that started them."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from server.process.listening import BACKLOG, url_of

PORT, LISTENER = "{port}", "{listener}"
"""Placeholders in a command: a free port, and a listening socket for Hypercorn's --bind."""
_PLACE = re.compile(f"{re.escape(PORT)}|{re.escape(LISTENER)}")
OURS = (sys.executable, "-m", "hypercorn", "--bind", LISTENER, "server.app:app")
"""Starts this project's server, with the settings of its environment."""
END_SECONDS = 30.0
"""How long a server may take to end after SIGTERM before it is killed."""
_POLL_SECONDS, _ANSWER_SECONDS = 0.1, 5.0
_LOG_BYTES = 1 << 20
_TAIL = 2000
_TRIES = 3
"""How many ports are tried in turn for a server that finds its port taken."""
_TAKEN = re.compile(r"address already in use|EADDRINUSE|couldn't bind", re.IGNORECASE)
_LEAD = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("who started it was killed")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]} cannot be started: {error.strerror}")
"""
"""Sets prctl(2)'s signal for the parent's death, which lasts over execve(2), then starts it."""


class Child:
    """A server in a child process.

    A command with ``LISTENER`` is handed a socket that listens already, so no other program can
    take its port in between. A command with ``PORT`` opens the port itself; if it finds the port
    taken, ``wait`` starts it again on another one.

    On Linux it is told to end when this process is killed, or the thread that started it ends.

    Args:
        command: of the server.
        environment: its variables; by default those of this process.
        host: where it listens.
        port: where it listens; 0 for any that is free.
        log_file: file to which its output is appended; None: one that goes with it.

    Attributes:
        url: of the server, as ``http://host:port``.
        process: the process.

    Raises:
        OSError: it cannot listen at that address.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        log_file: Path | None = None,
    ) -> None:
        self._log_file = log_file
        self._command, self._environment = tuple(command), environment
        self._host, self._port = host, port
        self._start()

    def _start(self) -> None:
        with listener(self._host, self._port) as opened:
            number, port = opened.fileno(), opened.getsockname()[1]
            handed = LISTENER in self._command
            if not handed:
                opened.close()
            self.url = url_of(self._host, port)
            places = {PORT: str(port), LISTENER: f"fd://{number}"}
            words = [_PLACE.sub(lambda found: places[found[0]], word) for word in self._command]
            self._last: str | None = None
            self._log: IO[bytes]  # closed by `end`
            if self._log_file is None:
                self._log = tempfile.TemporaryFile()  # noqa: SIM115
            else:
                self._log = self._log_file.open("a+b")
            self.process = subprocess.Popen(  # noqa: S603 - this project's or the user's own command
                _led(words),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
                pass_fds=(number,) if handed else (),
            )

    @property
    def log(self) -> str:
        """The end of what it has written, 1 MiB at most; it can be read after the end, too."""
        if self._last is not None:
            return self._last
        number = self._log.fileno()
        begin = max(0, os.fstat(number).st_size - _LOG_BYTES)
        # Not by seeking: the child writes where this file's position is.
        return os.pread(number, _LOG_BYTES, begin).decode("utf-8", "replace")

    @property
    def tail(self) -> str:
        """The last 2,000 characters of what it has written, for an error message."""
        return self.log[-_TAIL:]

    @property
    def is_running(self) -> bool:
        """Whether it has not ended, by itself or by ``end``."""
        if self._last is not None or self.process.returncode is not None:
            return False
        # It is not reaped here: its number must still be its own when `end` kills its group.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is None

    def wait(self, path: str, seconds: float) -> str | None:
        """Wait until it answers a GET of ``path`` with a status below 500.

        Returns:
            Why it does not, as the rest of a sentence; None: it does.
        """
        deadline, tries = time.monotonic() + seconds, 1
        while time.monotonic() < deadline:
            if not self.is_running:
                self.end()
                if tries == _TRIES or not self._found_port_taken():
                    return f"ended with {self.process.returncode} before it was ready"
                tries += 1
                self._start()
            if self._answers(path):
                return None
            time.sleep(_POLL_SECONDS)
        return f"was not ready within {seconds:g} s"

    def end(self, seconds: float | None = None) -> None:
        """End it with SIGTERM, then kill every process of its session that is left.

        Args:
            seconds: after which it is killed; None: ``END_SECONDS``.
        """
        if self._last is not None:
            return
        try:
            if self.is_running:
                self.process.terminate()
                deadline = time.monotonic() + (END_SECONDS if seconds is None else seconds)
                while self.is_running and time.monotonic() < deadline:
                    time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._last = self.log
            self._log.close()

    def _answers(self, path: str) -> bool:
        at = urlsplit(self.url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _found_port_taken(self) -> bool:
        opens = any(PORT in word for word in self._command) and not self._port
        return opens and _TAKEN.search(self.log) is not None


def listener(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A socket that listens; on any free port for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, port), family=family, backlog=BACKLOG)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it
    return opened


def _led(command: list[str]) -> list[str]:
    """The command, which on Linux is told to end when this process is killed."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-c", _LEAD, str(os.getpid()), *command]
