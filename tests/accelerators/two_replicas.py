"""Two replicas behind Ray Serve: they share limits, and the death of one is survived.

``python -m tests.accelerators.two_replicas``, from the root of the checkout, with the extra ``ray``
and redis-server installed. Prints its figures as JSON; ends by itself within five minutes.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from inferneo_jax.weights.catalog import default_checkpoints_dir
from server.keys.key import Limits
from tests.support.ray_cluster import Replicas, replicas
from tests.support.replica_load import CLIENTS, LOG_SECONDS, Load, share_limit

MOST_SECONDS = 290.0
FREE = Limits(requests=None, tokens=None, day_requests=None)


async def lose_one(server: Replicas, model: str, tokens: int, seconds: float) -> dict[str, Any]:
    """Kill a replica under load, and wait for the one that takes its place."""
    load = Load(server, model, server.key(FREE))
    victim, survivor = server.ready_pids()[:2]
    async with httpx.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(load.run(client, tokens))
        await asyncio.sleep(15)
        psutil.Process(victim).kill()
        killed = time.monotonic()
        while not (new := [p for p in server.ready_pids() if p not in (victim, survivor)]):
            assert time.monotonic() < killed + seconds, server.tail()
            await asyncio.sleep(0.2)
        back = time.monotonic()
        await asyncio.sleep(20)
        load.over = True
    await asyncio.sleep(LOG_SECONDS)
    under_way = [each for each in load.answers if each.began < killed < each.ended]
    later = [each for each in load.answers if each.began >= killed]
    failed = [each for each in (*under_way, *later) if not each.good]
    assert all(each.good for each in load.answers if each.ended <= killed)
    return {
        "killed": victim,
        "under_way": len(under_way),
        "failed": [
            {
                "outcome": each.outcome,
                "stream": each.stream,
                "sent_after_kill": round(each.began - killed, 2),
                "failed_after_kill": round(each.ended - killed, 2),
            }
            for each in failed
        ],
        "sent_later": len(later),
        "later_answered": sum(each.good for each in later),
        "seconds_median_before": _median(e for e in load.answers if e.ended <= killed),
        "seconds_median_one_replica": _median(e for e in later if e.good and e.ended <= back),
        "seconds_until_back": round(back - killed, 1),
        "new": new[0],
        "answered_by_process": load.by_pid(server),
    }


def _median(answers: Any) -> float | None:
    times = [each.ended - each.began for each in answers]
    return round(statistics.median(times), 2) if times else None


def measure(settings: dict[str, str], model: str, tokens: int) -> dict[str, Any]:
    """All figures."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, replicas(Path(folder), settings) as server:
        server.wait_replicas(2, 150)
        server.wait_ready(20)
        ready = time.monotonic()
        limit = asyncio.run(share_limit(server, model))
        left = MOST_SECONDS - 70 - (time.monotonic() - began)
        loss = asyncio.run(lose_one(server, model, tokens, left))
        memory = [psutil.Process(pid).memory_info().rss for pid in server.ready_pids()[1:3]]
    return {
        "model": model,
        "seconds_to_ready": round(ready - began, 1),
        "limit_over_both": limit,
        "loss_of_one": loss,
        "memory_mb_each": [round(each / 1e6) for each in memory],
        "seconds_in_all": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=24, help="of each request under load")
    options = parser.parse_args()
    checkpoints = os.environ.get("INFERNEO_CHECKPOINTS") or str(default_checkpoints_dir())
    settings = {
        "INFERNEO_CHECKPOINTS": checkpoints,
        "INFERNEO_MODELS": options.model,
        "INFERNEO_DTYPE": "float32",
        "INFERNEO_SLOTS": "4",
        "INFERNEO_MAX_LEN": "256",
    }
    signal.signal(signal.SIGALRM, lambda *_: _out_of_time())
    signal.alarm(int(MOST_SECONDS) - 50)
    print(json.dumps(measure(settings, options.model, options.tokens), indent=2))


def _out_of_time() -> None:
    raise TimeoutError("the replicas took too long")


if __name__ == "__main__":
    main()
