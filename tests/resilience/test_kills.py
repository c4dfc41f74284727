"""``kill -9`` at any moment: no client waits for ever, and the ledger holds all they received."""

import asyncio
import json
import os
import random
import sqlite3
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from server.keys.key import Key
from server.keys.store.open import open_store
from server.keys.store.store import LEASE_SECONDS, Store
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import add_key, bearer
from tests.support.machine_speed import Machine
from tests.support.raw_http import event_of
from tests.support.server_process import Process, process

pytestmark = pytest.mark.alone

ROUNDS = int(os.environ.get("KILL_ROUNDS", "4"))
"""Of each store; more find what is rarer."""
AT_MOST = 5.0
PATH = "/v1/completions"


@dataclass
class Holder:
    """The holder of a key, and what it received: ``requests``, ``completion`` and ``prompt``."""

    key: Key
    text: str
    received: Counter[str] = field(default_factory=Counter)

    async def stream(self, client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
        asked = asked | {"stream": True}
        async with client.stream("POST", PATH, json=asked, headers=bearer(self.text)) as answer:
            assert answer.status_code == 200
            self.received["requests"] += 1
            async for line in answer.aiter_lines():
                if event := event_of(line):
                    self._count(event)

    async def plain(self, client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
        answer = await client.post(PATH, json=asked, headers=bearer(self.text))
        assert answer.status_code == 200
        self.received["requests"] += 1
        self.received["completion"] += answer.json()["usage"]["completion_tokens"]

    async def embed(self, client: httpx.AsyncClient, _: dict[str, Any]) -> None:
        asked = {"model": EMBED, "input": ["some text", "more"]}
        answer = await client.post("/v1/embeddings", json=asked, headers=bearer(self.text))
        assert answer.status_code == 200
        self.received["requests"] += 1
        self.received["prompt"] += answer.json()["usage"]["prompt_tokens"]

    async def socket(self, server: Process, asked: dict[str, Any]) -> None:
        headers = bearer(self.text)
        async with websockets.connect(server.ws + PATH, additional_headers=headers) as ws:
            while True:
                await ws.send(json.dumps(asked | {"stream": True}))
                first = True
                while (frame := json.loads(await ws.recv()))["object"] != "done":
                    self.received["requests"] += first
                    first = False
                    self._count(frame)

    def _count(self, chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            self.received["completion"] += len(choice["text"])


async def keep_asking(server: Process, holder: Holder, seed: int) -> None:
    """Until the server is gone."""
    rng = random.Random(seed)
    gone = (httpx.TransportError, websockets.WebSocketException, OSError)
    with suppress(*gone):
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            while True:
                asked = {"model": CHAT, "prompt": "Hi", "max_tokens": rng.choice([1, 9, 99, 400])}
                way = rng.choice([holder.stream, holder.plain, holder.embed, None])
                if way is None:
                    await holder.socket(server, asked)
                else:
                    await way(client, asked)


async def killed_at_a_random_moment(
    server: Process, holders: list[Holder], rng: random.Random
) -> float:
    """Load the server, kill it at work; seconds until the last client had its end."""

    def answers() -> int:
        return sum(holder.received["requests"] for holder in holders)

    before = answers()
    tasks = [
        asyncio.create_task(keep_asking(server, holder, rng.randrange(10**9)))
        for holder in holders
        for _ in range(4)
    ]
    async with asyncio.timeout(30):
        while answers() <= before + 10:  # noqa: ASYNC110  (the holders count, and tell nobody)
            await asyncio.sleep(0.01)
    await asyncio.sleep(rng.uniform(0.05, 1.0))
    server.popen.kill()
    killed = time.monotonic()
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    ended = time.monotonic()
    server.popen.wait(60)  # its connections end before it does
    return ended - killed


def charged(store: Store, key: Key) -> Counter[str]:
    """All that the ledger holds of a key."""
    total: Counter[str] = Counter()
    for row in store.usage(key.id):
        total += Counter(requests=row.requests, completion=row.completion, prompt=row.prompt)
    return total


def test_kills_leave_nobody_waiting_and_the_ledger_complete(
    location: str, tmp_path: Path, machine: Machine
) -> None:
    rng, store = random.Random(location.split(":")[0]), open_store(location)
    holders = [Holder(*add_key(store)) for _ in range(3)]
    before: dict[str, Counter[str]] = {holder.key.id: Counter() for holder in holders}
    settings = {"INFERNEO_KEYS_DB": location, "INFERNEO_MAX_WAITING": "1000"}
    slowest = 0.0
    for number in range(ROUNDS):
        log = tmp_path / f"log {number}"
        with process(log, settings, "tests.resilience.fake_app:app", workers=0) as server:
            server.wait_ready()
            slowest = max(slowest, asyncio.run(killed_at_a_random_moment(server, holders, rng)))
        later = time.time() + LEASE_SECONDS + 1
        store.sweep(later)
        for holder in holders:
            assert store.quota_status(holder.key.id, later).running == 0
            found = charged(store, holder.key)
            for name, received in holder.received.items():
                assert found[name] >= received, (number, name)
                assert found[name] >= before[holder.key.id][name], (number, name)
            before[holder.key.id] = found
        if not location.startswith("redis"):
            with closing(sqlite3.connect(location)) as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    received = sum((holder.received for holder in holders), Counter())
    found = sum(before.values(), Counter())
    print(f"{ROUNDS} kills; received {dict(received)}, charged {dict(found)}, {slowest:.2f} s")
    assert slowest < machine.seconds(AT_MOST)
    assert received["requests"] > 10 * ROUNDS
    assert received["completion"] > 20 * ROUNDS
    store.close()
