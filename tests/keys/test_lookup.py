"""Looking keys up: floods of texts that are none neither pile up nor hold up those that are."""

import asyncio
import threading
from collections import Counter

import pytest

from server.http.errors import ApiError
from server.keys.key import Key, new_text
from server.keys.lookup import MAX_UNPROVEN, KeyLookup
from server.keys.store.sqlite import SqliteStore
from server.keys.store.threads import StoreThreads
from tests.support.keyed_server import add_key
from tests.support.waiting import until_async


class SlowStore(SqliteStore):
    """Finds nothing until it is let."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.let = threading.Event()
        self.let.set()
        self.asked: Counter[str] = Counter()

    def find_key(self, key_id: str) -> Key | None:
        self.asked[key_id] += 1
        assert self.let.wait(30)
        return super().find_key(key_id)


@pytest.fixture
def store(tmp_path):
    return SlowStore(tmp_path / "keys.db")


@pytest.fixture
def threads(store):
    made = StoreThreads(store)
    yield made
    store.let.set()
    made.close()


async def test_a_flood_of_unknown_keys_is_refused_beyond_a_bound(store, threads) -> None:
    lookup = KeyLookup(threads)
    store.let.clear()
    texts = [new_text(f"unknown{i:03}") for i in range(1000)]
    tasks = [asyncio.create_task(lookup.matching(text[9:19], text)) for text in texts]

    async def refused() -> bool:
        return sum(task.done() for task in tasks) >= 1000 - MAX_UNPROVEN

    await until_async(refused)
    done, pending = await asyncio.wait(tasks, timeout=0.05)
    assert (len(done), len(pending)) == (1000 - MAX_UNPROVEN, MAX_UNPROVEN)
    assert threads._pool._work_queue.qsize() < MAX_UNPROVEN
    for task in done:
        error = task.exception()
        assert isinstance(error, ApiError)
        assert (error.status, error.headers["Retry-After"]) == (503, "1")
    store.let.set()
    assert await asyncio.gather(*pending) == [None] * MAX_UNPROVEN
    assert await lookup.matching(texts[0][9:19], texts[0]) is None  # and there is room again


async def test_a_key_that_was_found_before_is_not_refused(store, threads, monkeypatch) -> None:
    monkeypatch.setattr("server.keys.lookup.FRESH_SECONDS", 0.0)
    lookup, (key, text) = KeyLookup(threads), add_key(store)
    assert await lookup.matching(key.id, text) == key
    store.let.clear()
    wrong = new_text(key.id)  # its id is known, too
    flood = [asyncio.create_task(lookup.matching(key.id, wrong)) for _ in range(500)]
    await asyncio.sleep(0)
    right = [asyncio.create_task(lookup.matching(key.id, text)) for _ in range(500)]
    await asyncio.sleep(0)
    store.let.set()
    assert await asyncio.gather(*right) == [key] * 500  # one lookup serves them all
    answers = await asyncio.gather(*flood, return_exceptions=True)
    served = 1 + MAX_UNPROVEN  # the first, whose lookup all share, and those who then look anew
    assert Counter(map(type, answers)) == {type(None): served, ApiError: 500 - served}
    assert store.asked[key.id] == 3


async def test_many_who_bring_a_new_key_at_once_are_all_served(store, threads) -> None:
    lookup, (key, text) = KeyLookup(threads), add_key(store)
    found = await asyncio.gather(*(lookup.matching(key.id, text) for _ in range(500)))
    assert found == [key] * 500
    assert store.asked[key.id] == 1


async def test_clients_that_leave_take_no_lookup_with_them(store, threads, monkeypatch) -> None:
    monkeypatch.setattr("server.keys.lookup.FRESH_SECONDS", 0.0)
    lookup, (key, text) = KeyLookup(threads), add_key(store)
    assert await lookup.matching(key.id, text) == key
    store.let.clear()
    first, second = (asyncio.create_task(lookup.matching(key.id, text)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    store.let.set()
    assert await second == key
    assert first.cancelled()
    assert store.asked[key.id] == 2


async def test_a_changed_key_is_looked_up_anew(store, threads) -> None:
    lookup, (key, text) = KeyLookup(threads), add_key(store)
    assert await lookup.matching(key.id, text) == key
    store.change_key(key.id, {"name": '"another"'})
    found = await lookup.matching(key.id, text)
    assert found is not None
    assert found.name == "test"  # believed for a while
    lookup.forget(key.id)
    found = await lookup.matching(key.id, text)
    assert found is not None
    assert found.name == "another"
