"""A server in a process of its own, which never outlives the benchmark."""

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from server.bench.errors import BenchError, RequestFailedError
from server.bench.http import Client
from server.bench.peers import PORT, Side
from server.child import end, free_port, led

_POLL_SECONDS, _ANSWER_SECONDS = 0.1, 5.0
_TAIL = 3000


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
    port = str(free_port())
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
