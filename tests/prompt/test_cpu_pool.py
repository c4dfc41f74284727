"""Long texts are read on threads, which keys share."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from server.http.deadline import Deadline
from server.http.errors import ApiError
from server.prompt.cpu_pool import INLINE_BYTES, LARGE_BYTES, CpuPool
from tests.support.fake_engine import TIMEOUT

LONG = INLINE_BYTES + 1


async def read(
    text: CpuPool, name: str | None, work: Callable[[], Any], size: int = LONG, **kwargs: Any
) -> Any:
    return await text.run(size, work, owner=name, **kwargs)


def blocked(never: threading.Event) -> Callable[[], bool]:
    return lambda: never.wait(TIMEOUT)


async def settled(text: CpuPool) -> None:
    """Nothing is held any more: both threads may be had, one of them for a large text."""
    both = threading.Barrier(2)
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(
            *(text.run(size, lambda: both.wait(TIMEOUT)) for size in (LONG, LARGE_BYTES + 1))
        )
    assert not text._queued
    text.close()


async def test_the_long_texts_of_one_key_do_not_hold_up_another() -> None:
    text, never = CpuPool(), threading.Event()
    flood = [asyncio.create_task(read(text, "flood", blocked(never))) for _ in range(20)]
    await asyncio.sleep(0)
    async with asyncio.timeout(TIMEOUT):
        assert await read(text, "other", lambda: "read") == "read"
    assert not any(task.done() for task in flood)
    never.set()
    async with asyncio.timeout(TIMEOUT):
        assert all(await asyncio.gather(*flood))
    await settled(text)
    assert not text._turns


async def test_the_large_texts_of_several_keys_leave_a_thread_for_small_ones() -> None:
    text, never = CpuPool(), threading.Event()
    large = LARGE_BYTES + 1
    floods = [
        asyncio.create_task(read(text, name, blocked(never), large)) for name in ("a", "b", "c")
    ]
    await asyncio.sleep(0)
    async with asyncio.timeout(TIMEOUT):
        for name in ("d", None):
            assert await read(text, name, lambda: "read", LARGE_BYTES) == "read"
    assert not any(task.done() for task in floods)
    never.set()
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*floods)
    await settled(text)


async def test_without_keys_all_threads_are_used() -> None:
    text, both = CpuPool(), threading.Barrier(2)
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*(text.run(LONG, lambda: both.wait(TIMEOUT)) for _ in range(2)))
    await settled(text)


async def test_only_the_work_is_timed_and_not_the_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.prompt.cpu_pool.BUDGET_SECONDS", 0.05)
    text, never = CpuPool(), threading.Event()
    flood = [asyncio.create_task(read(text, f"{i}", blocked(never))) for i in range(2)]
    waiting = asyncio.create_task(read(text, "other", lambda: "read"))
    for task in flood:
        with pytest.raises(ApiError, match="shorten it"):
            await task
    await asyncio.sleep(0.1)  # longer than the work may take
    assert not waiting.done()
    never.set()
    async with asyncio.timeout(TIMEOUT):
        assert await waiting == "read"
    await settled(text)


@pytest.mark.parametrize("how", ["too late", "cancelled"])
async def test_a_turn_lasts_as_long_as_its_thread(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    text, never, begun = CpuPool(), threading.Event(), asyncio.Event()
    loop, calls = asyncio.get_running_loop(), []

    def work() -> None:
        calls.append(threading.current_thread())
        loop.call_soon_threadsafe(begun.set)
        never.wait(TIMEOUT)

    with monkeypatch.context() as patched:
        patched.setattr(
            "server.prompt.cpu_pool.BUDGET_SECONDS", 0.05 if how == "too late" else TIMEOUT
        )
        first = asyncio.create_task(read(text, "flood", work))
        await begun.wait()
        if how == "cancelled":
            first.cancel()
        with pytest.raises(ApiError if how == "too late" else asyncio.CancelledError):
            await first
    second = asyncio.create_task(read(text, "flood", work))
    async with asyncio.timeout(TIMEOUT):
        assert await read(text, "other", lambda: "read") == "read"
    assert len(calls) == 1
    never.set()
    async with asyncio.timeout(TIMEOUT):
        await second
    assert len(calls) == 2
    await settled(text)


@pytest.mark.parametrize(
    ("bound", "value", "queued"),
    [("MAX_QUEUED_BYTES", 3 * LONG, 3), ("WAIT_SECONDS", 0.05, 0)],
    ids=["too long a queue", "too long a wait"],
)
async def test_what_cannot_be_read_soon_is_an_overload_of_its_key(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: float, queued: int
) -> None:
    monkeypatch.setattr(f"server.prompt.cpu_pool.{bound}", value)
    text, never = CpuPool(), threading.Event()
    flood = [asyncio.create_task(read(text, "flood", blocked(never))) for _ in range(1 + queued)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        await read(text, "flood", lambda: "read")
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert int(caught.value.headers["Retry-After"]) >= 1
    async with asyncio.timeout(TIMEOUT):
        assert await read(text, "other", lambda: "read") == "read"
    never.set()
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*flood)
    await settled(text)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_wait_and_the_work_end_with_the_deadline(waits: bool) -> None:
    text, never = CpuPool(), threading.Event()
    first = asyncio.create_task(read(text, "a" if waits else "b", blocked(never)))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        await read(text, "a", blocked(never), deadline=Deadline(0.05))
    assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
    never.set()
    await first
    await settled(text)


async def test_a_failure_is_the_callers_and_gives_everything_back() -> None:
    text = CpuPool()

    def fail() -> None:
        raise ValueError("wrong")

    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            await read(text, "a", fail, LARGE_BYTES + 1)
    await settled(text)


async def test_small_work_that_may_block_is_done_in_a_thread() -> None:
    text = CpuPool()
    names = [
        await text.run(INLINE_BYTES, lambda: threading.current_thread().name, inline=inline)
        for inline in (True, False)
    ]
    assert [name.startswith("text") for name in names] == [False, True]
    await settled(text)
