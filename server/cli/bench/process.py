"""A server in a process of its own, which never outlives the benchmark."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from server.cli.bench.errors import BenchError
from server.cli.bench.peers import Side
from server.process.child import Child

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
    begin = time.monotonic()
    child = Child(side.command)
    try:
        if failure := child.wait(side.ready, start_seconds):
            log = child.log[-_TAIL:]
            raise BenchError(
                f"{side.label} {failure} (--start-seconds {start_seconds:g}); "
                f"the end of its log:\n{log}"
            )
        yield child.url, time.monotonic() - begin
    finally:
        child.end()


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
