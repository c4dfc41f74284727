"""A server in a process of its own, which never outlives the one that starts it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

_END_SECONDS = 30.0
"""How long a server that is told to end may take before it is killed."""
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


def free_port() -> int:
    """A port of this machine where nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def led(command: list[str]) -> list[str]:
    """The command, which on Linux is told to end when this process is killed."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-c", _LEAD, str(os.getpid()), *command]


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
