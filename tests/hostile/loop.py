"""How long an event loop leaves others waiting."""

import asyncio
import time

TICK = 0.005


class LagMeter:
    """Sleeps on a loop again and again, and notes how much too late it wakes, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lags: list[float] = []
        self._loop = loop

    def __enter__(self) -> "LagMeter":
        self._future = asyncio.run_coroutine_threadsafe(self._run(), self._loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._future.cancel()

    async def _run(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self.lags.append(time.perf_counter() - due)

    def at(self, quantile: float) -> float:
        ordered = sorted(self.lags)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


class CallbackMeter:
    """Notes how long each callback of a loop computes.

    It counts CPU time of the loop's thread: other work on the machine does not change it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest = 0.0
        self.num_callbacks = 0
        self._loop = loop

    def __enter__(self) -> "CallbackMeter":
        original = self._original = asyncio.events.Handle._run

        def run(handle: asyncio.Handle) -> None:
            begun = time.thread_time()
            original(handle)
            if handle._loop is self._loop:
                self.num_callbacks += 1
                self.longest = max(self.longest, time.thread_time() - begun)

        asyncio.events.Handle._run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.events.Handle._run = self._original  # type: ignore[method-assign]
