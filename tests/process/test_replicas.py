"""Replicas behind Ray Serve, on a tiny model: what they share, and what passes through Serve."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import websockets

from server.app import create_app
from server.config.settings import Settings
from tests.support.ray_cluster import Replicas, replicas
from tests.support.replica_load import LIMIT, Load, share_limit
from tests.support.tiny_checkpoints import CHAT, tiny_checkpoints

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

from server import replicas as served

PATH = "/v1/completions"
READY_SECONDS = 150.0
SHORT: dict[str, Any] = {"model": CHAT, "prompt": "x", "max_tokens": 4, "ignore_eos": True}
ENDLESS = SHORT | {"max_tokens": 20_000, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    settings = tiny_checkpoints(folder / "checkpoints")
    del settings["INFERNEO_KEYS_DB"]
    with replicas(folder, settings | {"INFERNEO_MODELS": str(folder / "checkpoints" / CHAT)}) as it:
        it.wait_replicas(2, READY_SECONDS)
        it.wait_ready(20)
        yield it


async def test_a_replica_that_is_not_ready_is_not_healthy() -> None:
    replica = SimpleNamespace(app=create_app(Settings(models=(CHAT,))))  # it is never loaded
    with pytest.raises(RuntimeError, match="/ready answers 503"):
        await served.Replica.check_health(replica)


def test_streams_come_token_by_token(server: Replicas) -> None:
    body = SHORT | {"max_tokens": 400, "stream": True}
    times, last = [], ""
    with httpx.stream("POST", server.url + PATH, json=body, headers=server.key()) as answer:
        assert answer.status_code == 200
        for line in filter(None, answer.iter_lines()):
            times.append(time.monotonic())
            last = line
    assert last == "data: [DONE]"
    assert len(times) > 100
    assert times[10] - times[0] < (times[-1] - times[0]) / 2


def test_a_client_that_leaves_ends_its_request(server: Replicas) -> None:
    headers = server.key() | {"X-Request-Id": "one-that-leaves"}
    with httpx.stream("POST", server.url + PATH, json=ENDLESS, headers=headers) as answer:
        next(answer.iter_lines())
    assert _said(server, "one-that-leaves")["disconnected"] is True


async def test_websockets_work_and_need_a_key(server: Replicas) -> None:
    headers = server.key()
    async with websockets.connect(server.ws + PATH, additional_headers=headers) as ws:
        await ws.send(json.dumps(SHORT))
        answer = json.loads(await ws.recv())
        assert answer["choices"][0]["finish_reason"] == "length"
    async with websockets.connect(server.ws + PATH) as ws:
        await ws.send(json.dumps(SHORT))
        assert json.loads(await ws.recv())["error"]["code"] == "invalid_api_key"


def test_without_a_key_nobody_is_served(server: Replicas) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


async def test_a_limit_holds_once_over_both(server: Replicas) -> None:
    figures = await share_limit(server, CHAT)
    assert figures["outcomes"] == {
        "answered": LIMIT,
        "429 rate_limit_exceeded": figures["sent"] - LIMIT,
    }
    assert len(figures["accepted_by_process"]) == 2


async def test_a_replica_that_is_killed_is_replaced(server: Replicas) -> None:
    """What it was doing fails; what is asked later is answered."""
    victim, survivor = server.ready_pids()[-2:]
    load = Load(server, CHAT, server.key())
    async with httpx.AsyncClient(timeout=60) as client:
        under_way = [asyncio.create_task(load.ask(client, 2000)) for _ in range(12)]
        await asyncio.sleep(1)
        assert not any(task.done() for task in under_way)
        psutil.Process(victim).kill()
        ends = await asyncio.gather(*under_way)
        assert {end.good for end in ends} == {True, False}
        later = [await load.ask(client, 2) for _ in range(20)]
        assert all(answer.good for answer in later)
        async with asyncio.timeout(READY_SECONDS):
            while server.ready_pids()[-1] in (victim, survivor):
                assert (await load.ask(client, 2)).good
                await asyncio.sleep(0.2)


def _said(server: Replicas, request_id: str) -> dict[str, Any]:
    """The log line of a request, once Ray has brought it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(StopIteration):
            return next(facts for _, facts in server.events("request") if facts["id"] == request_id)
        time.sleep(0.2)
    raise AssertionError(server.tail())
