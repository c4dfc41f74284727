"""Long texts are read on threads, which keys share."""

import asyncio
import threading

from quart import Quart

from server.access.caller import set_caller
from server.access.keys import Key
from server.text import INLINE_CHARACTERS, TextWork

LONG = INLINE_CHARACTERS + 1


async def read(text: TextWork, name: str | None, work: threading.Event) -> str | None:
    async with Quart("test").app_context():
        if name is not None:
            set_caller(Key(id=name, name=name, digest=""))
        await text.run(LONG, work.wait)
    return name


async def test_the_long_texts_of_one_key_do_not_hold_up_another() -> None:
    text, never, done = TextWork(), threading.Event(), threading.Event()
    done.set()
    flood = [asyncio.create_task(read(text, "flood", never)) for _ in range(20)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        assert await read(text, "other", done) == "other"
    assert not any(task.done() for task in flood)
    never.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*flood)
    assert not text._turns
    text.close()


async def test_without_keys_all_threads_are_used() -> None:
    text, both = TextWork(), threading.Barrier(2)
    async with asyncio.timeout(10):
        await asyncio.gather(*(text.run(LONG, lambda: both.wait(10)) for _ in range(2)))
    text.close()
