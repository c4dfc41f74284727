"""A slow engine accepts what it can finish in time, and refuses the rest at once."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from tests.support.raw_clients import Ending, body, plain
from tests.support.server_process import Process, process

pytestmark = pytest.mark.alone

SLOTS, PLACES = 8, 40
TOKENS, STEP_SECONDS = 60, 0.02


def test_what_a_slow_engine_accepts_it_finishes_in_time(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    settings = tiny | {
        "INFERNEO_MAX_WAITING": f"{PLACES - SLOTS}",
        "TEST_STEP_SECONDS": f"{STEP_SECONDS}",
        "INFERNEO_SPECULATION": "off",
    }

    async def ask(server: Process, number: int, seconds: float) -> Ending:
        headers = {"X-Request-Timeout": f"{seconds:.2f}"}
        return await plain(server, body(TOKENS, prompt=f"{number}"), headers=headers)

    async def crowd(server: Process, count: int, seconds: float) -> Counter[int]:
        asked = (ask(server, number, seconds) for number in range(count))
        return Counter(ending.status for ending in await asyncio.gather(*asked))

    async def run(server: Process) -> tuple[float, Counter[int]]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await crowd(server, SLOTS, 600) == {200: SLOTS}
        alone = loop.time() - began  # what a full set of slots takes, on this machine
        # All places would need five times as long.
        return alone, await crowd(server, PLACES, 3 * alone)

    with process(tmp_path / "log", settings, "tests.resilience.faults_app:app") as server:
        server.wait_ready()
        alone, found = asyncio.run(run(server))
    print(f"{TOKENS} tokens in {alone:.1f} s; of {PLACES} requests with three times that: {found}")
    assert found[200] >= SLOTS
    assert found[503] >= PLACES / 4
    assert found[504] <= 1
    assert found.total() == PLACES
