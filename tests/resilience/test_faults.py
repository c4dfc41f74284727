"""An engine that raises, hangs or dies: every client is told within five seconds."""

import asyncio
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.support.machine_speed import Machine
from tests.support.raw_clients import Ending, body, plain, socketed, stream
from tests.support.server_process import Process, check_empty, process, stats_of
from tests.support.tiny_checkpoints import CHAT
from tests.support.waiting import until_async

pytestmark = pytest.mark.alone

LONG = 30_000
AT_MOST = 5.0


class Faulty:
    """A server, the file of its orders, and the machine on which it runs."""

    def __init__(self, server: Process, orders: Path, machine: Machine) -> None:
        self.server, self.orders, self.machine = server, orders, machine

    def order(self, what: str) -> None:
        """Write at once, or the engine might read half."""
        new = self.orders.with_suffix(".new")
        new.write_text(what)
        new.rename(self.orders)


@pytest.fixture
def faulty(tiny: dict[str, str], tmp_path: Path, machine: Machine) -> Iterator[Faulty]:
    orders = tmp_path / "orders"
    settings = tiny | {"TEST_FAULTS": str(orders)}
    app = "tests.resilience.faults_app:app"
    with process(tmp_path / "log", settings, app, tracebacks=True) as server:
        server.wait_ready()
        yield Faulty(server, orders, machine)


async def crowd(server: Process) -> list[asyncio.Task[Ending]]:
    """Clients of each kind, twelve in all: some run, some wait."""
    kinds = (stream, plain, partial(socketed, patient=False)) * 4
    tasks = [asyncio.create_task(kind(server, body(LONG))) for kind in kinds]

    async def here() -> bool:
        stats = stats_of(server.address, CHAT)
        return stats["running"] == 8 and stats["waiting"] == 4

    await until_async(here)
    return tasks


async def ended(tasks: list[asyncio.Task[Ending]], told: float, machine: Machine) -> list[Ending]:
    """All of them, in time."""
    async with asyncio.timeout(60):
        endings = await asyncio.gather(*tasks)
    assert time.monotonic() - told < machine.seconds(AT_MOST)
    return endings


async def ready(server: Process) -> bool:
    async with httpx.AsyncClient(timeout=5) as client:
        return (await client.get(server.url + "/ready")).status_code == 200


async def check_serves(server: Process) -> None:
    assert (await plain(server, body(20))).tokens == 20
    check_empty(server.address, CHAT)


def test_a_step_that_raises_ends_its_requests_and_no_others(faulty: Faulty) -> None:
    server = faulty.server

    async def run() -> None:
        long = [asyncio.create_task(stream(server, body(LONG))) for _ in range(8)]

        async def full() -> bool:
            return bool(stats_of(server.address, CHAT)["running"] == 8)

        await until_async(full)
        waiting = [asyncio.create_task(kind(server, body(30))) for kind in (stream, plain)]
        await asyncio.sleep(0.2)
        told = time.monotonic()
        faulty.order("raise")
        for ending in await ended(long, told, faulty.machine):
            assert (ending.complete, ending.error) == (True, "engine_failed"), ending
        for ending in await ended(waiting, told, faulty.machine):
            assert (ending.complete, ending.error) == (True, None), ending
        print(f"raise: all ended {time.monotonic() - told:.2f} s later")
        await until_async(lambda: ready(server))
        await check_serves(server)

    asyncio.run(run())


def test_a_step_that_hangs_ends_every_request_and_the_engine_comes_back(faulty: Faulty) -> None:
    server = faulty.server

    async def run() -> None:
        tasks = await crowd(server)
        told = time.monotonic()
        faulty.order("9")
        for ending in await ended(tasks, told, faulty.machine):
            assert (ending.complete, ending.error) == (True, "engine_failed"), ending
        print(f"hang: all ended {time.monotonic() - told:.2f} s later")
        assert not await ready(server)
        refused = await plain(server, body(5))
        assert (refused.status, refused.error) == (503, "overloaded")
        await until_async(lambda: ready(server))
        await check_serves(server)
        assert server.popen.poll() is None

    asyncio.run(run())


def test_an_engine_that_never_answers_again_ends_the_server(faulty: Faulty) -> None:
    server = faulty.server

    async def run() -> None:
        task = asyncio.create_task(stream(server, body(LONG)))

        async def runs() -> bool:
            return bool(stats_of(server.address, CHAT)["running"] == 1)

        await until_async(runs)
        told = time.monotonic()
        faulty.order("600")
        (ending,) = await ended([task], told, faulty.machine)
        assert ending.error == "engine_failed"
        assert await asyncio.to_thread(server.popen.wait, 60) != 0
        print(f"lost: the process ended {time.monotonic() - told:.1f} s later")

    asyncio.run(run())
    assert "engine_lost" in server.log.read_text()


def test_a_server_that_is_killed_leaves_no_client_waiting(
    tiny: dict[str, str], tmp_path: Path, machine: Machine
) -> None:
    with process(tmp_path / "log", tiny, workers=0) as server:
        server.wait_ready()

        async def run() -> None:
            tasks = await crowd(server)
            told = time.monotonic()
            os.kill(server.popen.pid, 9)
            for ending in await ended(tasks, told, machine):
                assert not ending.complete, ending

        asyncio.run(run())
        assert server.popen.wait(30) == -9
    with process(tmp_path / "log", tiny, workers=0) as server:
        server.wait_ready()
        asyncio.run(check_serves(server))
