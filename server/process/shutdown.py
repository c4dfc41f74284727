"""Graceful shutdown: running requests finish, or get an error, before connections are closed.

Hypercorn (0.18) closes its listeners as soon as it is told to end, and all connections
``graceful_timeout`` (3 s) later, without notice. So :func:`held_up` delays the signal until
:func:`drain` is done.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event
from typing import Any

import structlog

from server.http.connection import Connections
from server.keys.store.threads import StoreThreads
from server.models.registry import Registry
from server.process.exit import exit_failed
from server.run.permits import Permits

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_GOODBYE_SECONDS = 2.0
"""How long clients have to read the error that ended their request."""
_ONCE_SECONDS = 0.5


async def drain(
    permits: Permits, registry: Registry, connections: Connections, seconds: float
) -> None:
    """Admit no more requests, and let those that run finish.

    Requests that still run after ``seconds`` get an error; then connections with unread data are
    closed.
    """
    permits.close()
    log.info("draining", seconds=seconds)
    if not await permits.emptied(seconds):
        log.warning(
            "drain_ended", reason=f"requests still ran after {seconds:g} s; they get errors"
        )
        await asyncio.to_thread(registry.stop)
    await connections.ended(_GOODBYE_SECONDS)
    if cut := connections.cut():
        log.info("connections_cut", number=cut)


async def end_if_lost(permits: Permits, registry: Registry, threads: StoreThreads) -> None:
    """End the process, with exit code 1, once a model can never serve again.

    Its memory and its thread cannot be recovered in this process, but a supervisor can restart it.
    """
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        if permits.closed.is_set():
            return  # engines are stopped then
        if reason := registry.lost():
            break
    log.error("engine_lost", reason=reason)
    permits.close()
    await asyncio.sleep(_GOODBYE_SECONDS)  # ``/ready`` and new requests get the reason meanwhile
    with suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await threads.flush()
    exit_failed(at_once=True)


@contextmanager
def held_up(before: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """While this is open, a signal to end first runs ``before``, and only then reaches Hypercorn.

    To be entered while the application starts. Where Hypercorn is not as expected, or is embedded
    with a trigger of its own, nothing is changed.
    """
    told = asyncio.Event()
    pass_on = _hold_event(told) or _hold_signals(told) or told.clear

    async def run() -> None:
        await told.wait()
        try:
            await before()
        finally:
            pass_on()

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()


def _hold_event(told: asyncio.Event) -> Callable[[], None] | None:
    """With workers: the main process tells them through an event, which they poll."""
    process: Any = multiprocessing.current_process()
    event = getattr(process, "_kwargs", {}).get("shutdown_event")
    if not isinstance(event, Event):
        return None
    original, held = event.is_set, True

    def is_set() -> bool:
        if held and original():
            told.set()
        return not held and original()

    def pass_on() -> None:
        nonlocal held
        held = False

    event.is_set = is_set  # type: ignore[method-assign]
    return pass_on


def _hold_signals(told: asyncio.Event) -> Callable[[], None] | None:
    """Without workers: Hypercorn has set handlers on the event loop before the start.

    A second Ctrl-C ends the process at once.
    """
    loop: Any = asyncio.get_running_loop()
    known = getattr(loop, "_signal_handlers", {})
    handles = {
        number: known[number] for number in (signal.SIGINT, signal.SIGTERM) if number in known
    }
    if not handles:
        return None
    first = 0.0

    def tell(number: int) -> None:
        nonlocal first
        first = first or time.monotonic()
        # Programs around this one may pass on what the terminal has sent already.
        if number == signal.SIGINT and time.monotonic() - first > _ONCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        told.set()

    for number in handles:
        loop.add_signal_handler(number, tell, number)

    def pass_on() -> None:
        for handle in handles.values():
            handle._run()

    return pass_on
