"""Readers on an event loop are woken by other threads, all of a step at once."""

import asyncio
import gc
import threading
import weakref

from server.run.generation import _Wakeups


async def test_one_call_wakes_every_reader_of_a_step() -> None:
    loop = asyncio.get_running_loop()
    calls: list[object] = []
    original = loop.call_soon_threadsafe

    def call_soon_threadsafe(*args: object, **kwargs: object) -> asyncio.Handle:
        calls.append(args)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    loop.call_soon_threadsafe = call_soon_threadsafe  # type: ignore[method-assign, assignment]
    events = [asyncio.Event() for _ in range(100)]
    wakeups = _Wakeups.of(loop)
    assert wakeups is _Wakeups.of(loop)

    def step() -> None:
        for event in events:
            wakeups.wake(event)

    for _ in range(2):  # again after they were woken
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()  # blocks the loop, as a busy one is
        assert not events[0].is_set()
        await asyncio.gather(*(event.wait() for event in events))
        for event in events:
            event.clear()
    assert len(calls) == 2


def test_a_loop_that_is_gone_is_not_kept() -> None:
    async def of_this_loop() -> tuple[_Wakeups, "weakref.ref[asyncio.AbstractEventLoop]"]:
        loop = asyncio.get_running_loop()
        return _Wakeups.of(loop), weakref.ref(loop)

    wakeups, loop = asyncio.run(of_this_loop())
    wakeups.wake(asyncio.Event())  # tells nobody, and is no error
    gc.collect()
    assert loop() is None
