"""A server that is told to end cuts nobody off without a word."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from tests.support.machine_speed import Machine
from tests.support.raw_clients import body, plain, socketed, stream, stuck
from tests.support.server_process import Process, process, stats_of
from tests.support.tiny_checkpoints import CHAT
from tests.support.waiting import until_async

pytestmark = pytest.mark.alone

SHORT, LONG = 400, 30_000


async def running(server: Process, number: int) -> bool:
    stats = stats_of(server.address, CHAT)
    return stats["running"] + stats["waiting"] >= number


async def status(server: Process, client: httpx.AsyncClient) -> str:
    return (await client.get(server.url + "/ready")).json()["status"]


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_under_load_ends_everything_with_a_word(
    tiny: dict[str, str], tmp_path: Path, workers: int, machine: Machine
) -> None:
    drain = min(20.0, machine.seconds(4))
    settings = tiny | {"INFERNEO_DRAIN_SECONDS": f"{drain}"}

    async def load(server: Process) -> None:
        raw = stuck(server)
        kinds = (stream, plain, socketed)
        jobs = {n: [asyncio.create_task(k(server, body(n))) for k in kinds] for n in (SHORT, LONG)}
        idle = asyncio.create_task(socketed(server, None))
        await until_async(lambda: running(server, 4))
        async with httpx.AsyncClient() as client:  # a probe, on a connection that it keeps
            assert await status(server, client) == "ready"
            told = time.monotonic()
            server.popen.terminate()
            await until_async(lambda: draining(server, client))
            assert time.monotonic() - told < machine.seconds(2)
            # A router asks on new connections, and sends no more before those it has are closed.
            async with httpx.AsyncClient() as router:
                assert (await router.get(server.url + "/ready")).status_code == 503
            assert not any(job.done() for job in jobs[LONG])
            refused = await plain(server, body(5))
            assert (refused.status, refused.error) == (503, "overloaded")
        for ending in await asyncio.gather(*jobs[SHORT]):
            assert (ending.complete, ending.error) == (True, None), ending
            assert ending.tokens >= 1
        for ending in await asyncio.gather(*jobs[LONG]):
            assert (ending.complete, ending.error) == (True, "overloaded"), ending
        assert (await idle).status == 1001
        with raw:
            assert await asyncio.to_thread(server.popen.wait, 60) == 0, server.tail()
        assert drain <= time.monotonic() - told < drain + machine.seconds(8)

    async def draining(server: Process, client: httpx.AsyncClient) -> bool:
        return await status(server, client) == "draining"

    with process(tmp_path / "log", settings, workers=workers) as server:
        server.wait_ready()
        asyncio.run(load(server))


def test_an_idle_server_ends_at_once(
    tiny: dict[str, str], tmp_path: Path, machine: Machine
) -> None:
    with process(tmp_path / "log", tiny) as server:
        server.wait_ready()
        told = time.monotonic()
        server.popen.terminate()
        assert server.popen.wait(60) == 0
        assert time.monotonic() - told < machine.seconds(5)
