"""A server with API keys and a fake engine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import websockets
from websockets.sync.client import ClientConnection

from inferneo_jax import Tokenizer
from server.keys.key import Key, Limits, encode_fields, new_key
from server.keys.store.open import open_store
from server.keys.store.store import Store
from tests.support.fake_server import Rig, running

FREE = Limits(requests=None, tokens=None, day_requests=None)


def add_key(store: Store, limits: Limits = FREE, **rights: Any) -> tuple[Key, str]:
    """A new key and its text."""
    named = {"name": "test", "created": time.time()} | rights
    key, text = new_key(store.pepper(), limits=limits, **named)
    store.add_key(key)
    return key, text


class KeyRig:
    """A running server and the store that it reads."""

    def __init__(self, rig: Rig, store: Store, location: str) -> None:
        self.rig, self.store, self.location = rig, store, location
        self.client, self.engine, self.url, self.ws = rig.client, rig.engine, rig.url, rig.ws

    def key(self, limits: Limits = FREE, **rights: Any) -> tuple[Key, str]:
        """A new key and its text."""
        return add_key(self.store, limits, **rights)

    def headers(self, limits: Limits = FREE, **rights: Any) -> dict[str, str]:
        """Those of a new key."""
        return bearer(self.key(limits, **rights)[1])

    def change(self, key: Key, **changes: Any) -> None:
        """Change a key behind the server's back."""
        self.store.change_key(key.id, encode_fields(changes))


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@contextmanager
def key_rig(tokenizer: Tokenizer, location: str, **settings: Any) -> Iterator[KeyRig]:
    store = open_store(location)
    with running(tokenizer, keys_db=location, **settings) as rig:
        yield KeyRig(rig, store, location)
        rig.engine.release()
        rig.engine.wait_until(lambda e: e.num_running == 0)
    store.close()


def closing_code(ws: ClientConnection) -> int:
    """What an open socket is closed with."""
    with suppress(websockets.ConnectionClosed):
        while True:
            ws.recv(timeout=10)
    assert ws.close_code is not None
    return ws.close_code
