"""Changes of keys that overlap, and clients that leave in the middle of one."""

import io
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from inferneo_jax import Tokenizer
from server.keys.key import Key
from server.keys.store.redis import RedisStore
from server.keys.store.sqlite import SqliteStore
from tests.keys.admins import ADMIN, KEYS, rig
from tests.support.keyed_server import KeyRig, bearer, key_rig
from tests.support.waiting import until

__all__ = ["rig"]
PATIENCE = 20.0


def slow_changes(monkeypatch: pytest.MonkeyPatch, held: Any) -> None:
    """Have both stores call ``held`` before they change a key."""
    for kind in (SqliteStore, RedisStore):
        change = kind.change_key

        def held_up(self: Any, *arguments: Any, _change: Any = change) -> None:
            held()
            _change(self, *arguments)

        monkeypatch.setattr(kind, "change_key", held_up)


def ending(admins: list[tuple[Key, str]], *servers: KeyRig) -> Callable[[int], int]:
    """Has one of two administrators end the other, each at a server; the status."""

    def end(which: int) -> int:
        url = servers[which % len(servers)].url
        path, headers = f"{KEYS}/{admins[1 - which][0].id}", bearer(admins[which][1])
        return httpx.delete(url + path, headers=headers, timeout=PATIENCE).status_code

    return end


def test_two_administrators_cannot_end_each_other_at_once(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    admins = [rig.key(scopes=ADMIN) for _ in range(2)]
    both = threading.Barrier(2)

    def meet() -> None:
        """Let the second check before the first has changed anything, if it can."""
        try:
            both.wait(0.5)
        except threading.BrokenBarrierError:
            both.reset()

    slow_changes(monkeypatch, meet)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(ending(admins, rig), range(2))) in ([200, 409], [200, 401])
    assert sum(key.revoked is None for key in rig.store.list_keys()) == 1


def test_two_administrators_cannot_end_each_other_by_two_servers(
    rig: KeyRig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    admins = [rig.key(scopes=ADMIN) for _ in range(2)]
    both, calls = threading.Barrier(2), itertools.count()

    def meet() -> None:
        """Change nothing before both servers have found that there is another administrator."""
        if next(calls) < 2:
            both.wait(PATIENCE)

    slow_changes(monkeypatch, meet)
    with key_rig(tokenizer, rig.location) as other, ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(ending(admins, rig, other), range(2)))
    assert sorted(statuses) in ([200, 409], [409, 409])
    assert [key.revoked is None for key in rig.store.list_keys()].count(True) == statuses.count(409)


def test_a_client_that_leaves_takes_no_line_of_the_log_with_it(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch, logged: io.StringIO
) -> None:
    headers = rig.headers(scopes=ADMIN)
    key, text = rig.key()
    assert rig.client.get("/v1/models", headers=bearer(text)).status_code == 200
    started, left = threading.Event(), threading.Event()

    def wait_for_departure() -> None:
        started.set()
        assert left.wait(PATIENCE)

    slow_changes(monkeypatch, wait_for_departure)

    def wait_for(event: str, fact: str) -> None:
        def written() -> bool:
            return any(event in line and fact in line for line in logged.getvalue().splitlines())

        until(written, PATIENCE, logged.getvalue)

    with httpx.Client(base_url=rig.url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.delete(f"{KEYS}/{key.id}", headers=headers, timeout=0.2)
        assert started.wait(PATIENCE)
    wait_for('"request"', '"disconnected": true')
    left.set()
    wait_for('"key_revoked"', f'"target": "{key.id}"')
    assert rig.client.get("/v1/models", headers=bearer(text)).status_code == 401
