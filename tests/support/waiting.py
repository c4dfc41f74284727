"""Waiting for a condition that another thread or process brings about."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psutil

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    seconds: float = 10.0,
    why: Callable[[], object] = lambda: "it never came",
) -> T:
    """What the condition is once it is true.

    Args:
        condition: asked again and again.
        seconds: after which it fails.
        why: what the failure says.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.005)
    return found


async def until_async(condition: Callable[[], Awaitable[object]], seconds: float = 30.0) -> None:
    """Ask again until it is true."""
    async with asyncio.timeout(seconds):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


def until_gone(*pids: int, seconds: float = 20.0) -> None:
    """Wait until none of these processes runs any more."""

    def gone(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(lambda: all(map(gone, pids)), seconds, lambda: "it outlived who started it")
