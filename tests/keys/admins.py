"""An administrator of a server, over a store of each kind."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_server import CHAT
from tests.support.keyed_server import KeyRig, key_rig

KEYS = "/admin/keys"
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
Ask = Callable[..., httpx.Response]
ADMIN = frozenset({"admin"})


@pytest.fixture
def rig(tokenizer: Tokenizer, location: str) -> Iterator[KeyRig]:
    """A server of its own for each test, over each store."""
    with key_rig(tokenizer, location) as found:
        yield found


@pytest.fixture
def ask(rig: KeyRig) -> Ask:
    """Requests of an administrator."""
    headers = rig.headers(scopes=frozenset({"admin"}))

    def send(method: str, path: str, body: Any = None, base: str = KEYS) -> httpx.Response:
        return rig.client.request(method, base + path, json=body, headers=headers)

    return send
