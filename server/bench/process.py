"""A server in a process of its own, which never outlives the benchmark."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from server.bench.errors import BenchError, RequestFailedError
from server.bench.http import Client
from server.bench.peers import PORT, Side

_POLL_SECONDS, _ANSWER_SECONDS = 0.1, 5.0
_END_SECONDS = 30.0
"""How long a server that is told to end may take before it is killed."""
_TAIL = 3000
_LEAD = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the benchmark was killed")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]} cannot be started: {error.strerror}")
"""
"""Sets prctl(2)'s signal for the parent's death, which lasts over execve(2), then starts it."""


@contextlib.contextmanager
def running(side: Side, start_seconds: float) -> Iterator[tuple[str, float | None]]:
    """The URL of a side that can serve, and how many seconds its start took.

    At the end, or whatever happens, what was started has ended, its children too.

    Raises:
        BenchError: it ended by itself, or is not ready in time; with the end of its log.
    """
    if side.command is None:
        assert side.url is not None
        yield side.url, None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [word.replace(PORT, port) for word in side.command]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        begin = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - this project's or the user's own command
            led(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            failure = asyncio.run(_wait_ready(process, url, side.ready, start_seconds))
            if failure:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
                text = log.read().decode("utf-8", "replace")
                raise BenchError(f"{side.label} {failure}; the end of its log:\n{text}")
            yield url, time.monotonic() - begin
        finally:
            end(process)


def led(command: list[str]) -> list[str]:
    """The command, which on Linux is told to end when this process is killed."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-c", _LEAD, str(os.getpid()), *command]


async def _wait_ready(
    process: "subprocess.Popen[bytes]", url: str, path: str, seconds: float
) -> str | None:
    """Wait until it can serve; why it cannot."""
    deadline = time.monotonic() + seconds
    async with Client(url) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return f"ended with {process.returncode} before it was ready"
            with contextlib.suppress(RequestFailedError, TimeoutError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    if await client.request(path, None, lambda *_: None) < 500:
                        return None
            await asyncio.sleep(_POLL_SECONDS)
    return f"was not ready within {seconds:g} s (--start-seconds)"


def end(process: "subprocess.Popen[bytes]") -> None:
    """End it, kindly first, and every process of its session that is left."""
    try:
        if process.poll() is None:
            process.terminate()
            deadline = time.monotonic() + _END_SECONDS
            # It is not reaped yet: its number must still be its own when the group is killed.
            while not _has_ended(process.pid) and time.monotonic() < deadline:
                time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _has_ended(pid: int) -> bool:
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, options) is not None


@contextlib.contextmanager
def signals_end_it() -> Iterator[None]:
    """Have SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that servers are ended."""

    def unwind(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, unwind) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
