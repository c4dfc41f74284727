"""Hours of mixed load with random aborts leave nothing behind.

``python -m tests.tools.soak --minutes 60``, from the root of the checkout. Clients of every
kind ask a server with keys for short and long answers, in bursts that leave it idle in between;
a third of them leave at a random moment. After each burst, when all is quiet, memory, threads and
open files of the server are noted, and slots, pages and places must all be free. They are flat if
the second half is no higher than the first, a little noise aside.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import websockets

from server.keys.store.open import open_store
from tests.support.keyed_server import add_key
from tests.support.server_process import Process, process, stats_of
from tests.support.tiny_checkpoints import CHAT, EMBEDDING, tiny_checkpoints

CLIENTS = 16
BURST_SECONDS = 20.0
QUIET_SECONDS = 30.0
MOST_GROWTH = 0.03
"""Of memory, from the first half to the second."""


@dataclass(frozen=True)
class Sample:
    """What the server holds when nobody asks for anything; memory in MB."""

    seconds: float
    memory: float
    threads: int
    files: int
    sockets: int


class Soak:
    """The load, and what it has seen."""

    def __init__(self, server: Process, key: str, seed: int) -> None:
        self.server = server
        self.headers = {"Authorization": f"Bearer {key}"}
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.samples: list[Sample] = []

    def asked(self) -> dict[str, Any]:
        rng = self.rng
        asked: dict[str, Any] = {
            "model": CHAT,
            "prompt": [rng.randrange(200) for _ in range(rng.choice([1, 20, 300, 2000]))],
            "max_tokens": rng.choice([1, 30, 300, 3000]),
            "n": rng.choice([1, 1, 1, 4]),
            "temperature": rng.choice([0, 1]),
            "ignore_eos": True,
        }
        if rng.random() < 0.2:
            asked["logprobs"] = 5
        return asked

    async def http(self, client: httpx.AsyncClient, stream: bool) -> str:
        asked = self.asked() | {"stream": stream}
        url = self.server.url + "/v1/completions"
        async with client.stream("POST", url, json=asked, headers=self.headers) as answer:
            last = b""
            async for chunk in answer.aiter_bytes():
                last = (last + chunk)[-20:]
        if answer.status_code == 200 and stream:
            assert last.endswith(b"data: [DONE]\n\n"), last
        return str(answer.status_code)

    async def socket(self) -> str:
        url = self.server.ws + "/v1/completions"
        async with websockets.connect(url, additional_headers=self.headers) as ws:
            for _ in range(self.rng.randint(1, 3)):
                await ws.send(orjson.dumps(self.asked() | {"stream": True}).decode())
                while True:
                    frame = orjson.loads(await ws.recv())
                    if "error" in frame:
                        return str(frame["error"]["code"])
                    if frame["object"] == "done":
                        break
        return "closed"

    async def embed(self, client: httpx.AsyncClient) -> str:
        texts = ["word " * self.rng.randint(1, 6)] * self.rng.choice([1, 8, 64])
        asked = {"model": EMBEDDING, "input": texts}
        url = self.server.url + "/v1/embeddings"
        return str((await client.post(url, json=asked, headers=self.headers)).status_code)

    async def wrong(self, client: httpx.AsyncClient) -> str:
        """What is refused, for any reason."""
        url = self.server.url + "/v1/completions"
        body = self.rng.choice([b"{", b"[]", b'{"model":"x"}', b"x" * 5_000_000])
        headers = self.rng.choice([self.headers, {}]) | {"Content-Type": "application/json"}
        return str((await client.post(url, content=body, headers=headers)).status_code)

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            async with httpx.AsyncClient(timeout=120) as client:
                ways = {
                    "sse": self.http(client, True),
                    "plain": self.http(client, False),
                    "websocket": self.socket(),
                    "embeddings": self.embed(client),
                    "wrong": self.wrong(client),
                }
                name = self.rng.choice(list(ways))
                for other, way in ways.items():
                    if other != name:
                        way.close()
                timeout = self.rng.choice([None, None, self.rng.uniform(0, 1.0)])
                ended = "left"
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        ended = await ways[name]
                self.seen[f"{name} {ended}"] += 1

    async def burst(self, started: float) -> None:
        until = time.monotonic() + BURST_SECONDS
        await asyncio.gather(*(self.client(until) for _ in range(CLIENTS)))
        deadline = time.monotonic() + QUIET_SECONDS
        while True:
            stats = stats_of(self.server.address, CHAT)
            sample = self.sample(time.monotonic() - started)
            held = stats["slots_used"], stats["pages_used"], stats["waiting"]
            if held == (0, 0, 0) and sample.sockets == 0:
                break
            assert time.monotonic() < deadline, (held, sample)
            await asyncio.sleep(0.2)
        assert stats["compiles_after_ready"] == 0
        assert stats["ready"]
        self.samples.append(sample)
        print(f"{sum(self.seen.values()):6} requests  {sample}", flush=True)

    def sample(self, seconds: float) -> Sample:
        server = psutil.Process(self.server.popen.pid)
        connections = [c for c in server.net_connections("tcp") if c.status != "LISTEN"]
        memory = server.memory_info().rss / 1e6
        return Sample(
            round(seconds, 1),
            round(memory, 1),
            server.num_threads(),
            server.num_fds() - len(connections),
            len(connections),
        )

    def check(self) -> None:
        """Say how it went; everything must be flat."""
        for name, number in sorted(self.seen.items()):
            print(f"{number:7} {name}")
        half = len(self.samples) // 2
        warm, rest = self.samples[half // 2 : half], self.samples[half:]
        for name in ("memory", "threads", "files"):
            first = statistics.median(getattr(sample, name) for sample in warm)
            second = statistics.median(getattr(sample, name) for sample in rest)
            print(f"{name}: {first:g} in the first half, {second:g} in the second")
            allowed = first * MOST_GROWTH if name == "memory" else 1
            assert second - first <= allowed, name


def run(minutes: float, seed: int) -> None:
    """Make a server, load it, check it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = tiny_checkpoints(Path(folder))
        store = open_store(settings["INFERNEO_KEYS_DB"])
        key, text = add_key(store)
        with process(Path(folder) / "log", settings, workers=0) as server:
            server.wait_ready()
            soak = Soak(server, text, seed)
            started = time.monotonic()
            while time.monotonic() - started < minutes * 60:
                asyncio.run(soak.burst(started))
            soak.check()
            quota_status = store.quota_status(key.id, None)
            assert quota_status.running == 0, quota_status
        store.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(arguments.minutes, arguments.seed)
