"""What servers share between processes, and what keys never share."""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.keys.store.open import open_store
from tests.support.fake_server import CHAT as FAKE_CHAT
from tests.support.keyed_server import FREE, add_key, bearer
from tests.support.server_process import Process, process, stats_of
from tests.support.tiny_checkpoints import CHAT

pytestmark = pytest.mark.alone

CALLS, LIMIT = 200, 60
PATH = "/v1/completions"
LENGTH, PAIRS, TRIES = 6000, 12, 3


def test_two_servers_admit_exactly_the_limit_between_them(location: str, tmp_path: Path) -> None:
    store = open_store(location)
    headers = bearer(add_key(store, replace(FREE, requests=LIMIT))[1])
    settings = {"INFERNEO_KEYS_DB": location, "INFERNEO_MAX_WAITING": "1000"}
    app = "tests.resilience.fake_app:app"

    async def ask(client: httpx.AsyncClient) -> int:
        body = {"model": FAKE_CHAT, "prompt": "Hi", "max_tokens": 2}
        answer = await client.post(PATH, json=body, headers=headers)
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert answer.headers["X-RateLimit-Remaining"] == "0"
        return answer.status_code

    async def everybody(servers: list[Process]) -> list[int]:
        clients = [httpx.AsyncClient(base_url=each.url, timeout=60) for each in servers]
        calls = [ask(clients[i % len(clients)]) for i in range(CALLS)]
        try:
            return await asyncio.gather(*calls)
        finally:
            for client in clients:
                await client.aclose()

    with (
        process(tmp_path / "one", settings, app, workers=0) as one,
        process(tmp_path / "two", settings, app, workers=0) as two,
    ):
        one.wait_ready()
        two.wait_ready()
        statuses = asyncio.run(everybody([one, two]))
    assert {status: statuses.count(status) for status in set(statuses)} == {
        200: LIMIT,
        429: CALLS - LIMIT,
    }
    store.close()


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("sharing")
    settings = tiny | {"INFERNEO_KEYS_DB": str(folder / "keys.db"), "INFERNEO_REQUIRE_KEY": "true"}
    with process(folder / "log", settings) as made:
        made.wait_ready()
        yield made


class Asker:
    """Asks for one token, so that what takes time is the prompt."""

    def __init__(self, server: Process, tiny: dict[str, str]) -> None:
        location = Path(server.log).parent / "keys.db"
        store = open_store(location)
        self.keys = [bearer(add_key(store)[1]) for _ in range(2)]
        store.close()
        self.server = server
        self.rng = random.Random(5)
        self.client = httpx.Client(base_url=server.url, timeout=60)

    def prompt(self) -> list[int]:
        return [self.rng.randrange(200) for _ in range(LENGTH)]

    def ask(self, key: int, prompt: list[int], **fields: Any) -> tuple[float, int, int]:
        """Seconds, cached tokens by its own account, tokens that the engine computed."""
        before = self.computed()
        body = {"model": CHAT, "prompt": prompt, "max_tokens": 1, "ignore_eos": True} | fields
        started = time.perf_counter()
        answer = self.client.post(PATH, json=body, headers=self.keys[key]).json()
        seconds = time.perf_counter() - started
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return seconds, cached, self.computed() - before

    def computed(self) -> int:
        return int(stats_of(self.server.address, CHAT)["prompt_tokens"])


@pytest.fixture(scope="module")
def asker(server: Process, tiny: dict[str, str]) -> Iterator[Asker]:
    made = Asker(server, tiny)
    yield made
    made.client.close()


def test_a_prompt_is_reused_for_its_own_key_only(asker: Asker) -> None:
    prompt = asker.prompt()
    assert asker.ask(0, prompt)[1:] == (0, LENGTH)
    _, cached, computed = asker.ask(0, prompt)
    assert cached > 0.99 * LENGTH
    assert computed == LENGTH - cached
    assert asker.ask(1, prompt)[1:] == (0, LENGTH)


def test_no_salt_reaches_another_keys_prompts(asker: Asker) -> None:
    prompt = asker.prompt()
    own = asker.keys[0]["Authorization"].split("-")[1]
    asker.ask(0, prompt)
    for salt in (f"{own}:", own, f"key:{own}:", f":{own}:", "", ":"):
        assert asker.ask(1, prompt, cache_salt=salt)[1:] == (0, LENGTH), salt


def test_time_does_not_tell_what_another_key_asked(asker: Asker) -> None:
    """Interleaved, so that whatever else the machine does falls on all alike."""
    for _ in range(TRIES):
        own, others, fresh = [], [], []
        for _ in range(PAIRS):
            prompt = asker.prompt()
            asker.ask(0, prompt)
            own.append(asker.ask(0, prompt)[0])
            asked = [(others, prompt), (fresh, asker.prompt())]
            asker.rng.shuffle(asked)
            for times, wanted in asked:
                times.append(asker.ask(1, wanted)[0])
        middle = statistics.median(fresh)
        ratio, reused = statistics.median(others) / middle, statistics.median(own) / middle
        print(
            f"fresh {middle * 1e3:.1f} ms; another key's {ratio:.3f} of that, its own {reused:.3f}"
        )
        if 0.9 < ratio < 1.1 and reused < 0.6:
            return
    raise AssertionError((ratio, reused))
