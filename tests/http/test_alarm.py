"""An alarm rings when its time has come, and at no other time."""

import asyncio
import time

from server.http.alarm import Alarm


async def test_it_rings_once_after_it_was_last_set() -> None:
    rung: list[float] = []
    alarm = Alarm(0.05, lambda: rung.append(time.monotonic()))
    for _ in range(20):
        alarm.set()
        await asyncio.sleep(0.01)
    alarm.set()
    started = time.monotonic()
    rung.clear()
    await asyncio.sleep(0.2)
    (at,) = rung
    assert at - started >= 0.049


async def test_it_is_silent_once_cleared_or_closed_and_leaves_no_timer() -> None:
    rung: list[int] = []
    cleared, closed = (Alarm(0.02, lambda: rung.append(1)) for _ in range(2))
    cleared.set()
    cleared.clear()
    closed.set()
    closed.close()
    await asyncio.sleep(0.1)
    assert rung == []
    cleared.set()
    await asyncio.sleep(0.1)
    assert rung == [1]


async def test_setting_it_again_makes_no_timer() -> None:
    loop = asyncio.get_running_loop()
    alarm = Alarm(60, lambda: None)
    alarm.set()
    before = len(loop._scheduled)  # type: ignore[attr-defined]
    for _ in range(100):
        alarm.set()
        alarm.clear()
    assert len(loop._scheduled) == before  # type: ignore[attr-defined]
    alarm.close()
