"""An administrator of a server: over HTTP at a store of each kind, and at the command line."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from inferneo_jax import Tokenizer
from server.cli.main import app
from tests.support.fake_server import CHAT, as_new
from tests.support.keyed_server import KeyRig

KEYS = "/admin/keys"
CHATS = "/v1/chat/completions"
BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
Ask = Callable[..., httpx.Response]
ADMIN = frozenset({"admin"})


@pytest.fixture
def rig(administered: KeyRig, tokenizer: Tokenizer) -> Iterator[KeyRig]:
    """The module's server over each store, where every key there was is revoked."""
    for key in administered.store.list_keys():
        if key.revoked is None:
            administered.change(key, revoked=1.0)
    with as_new(administered.engine, tokenizer):
        yield administered


@pytest.fixture
def ask(rig: KeyRig) -> Ask:
    """Requests of an administrator."""
    headers = rig.headers(scopes=ADMIN)

    def send(method: str, path: str, body: Any = None, base: str = KEYS) -> httpx.Response:
        return rig.client.request(method, base + path, json=body, headers=headers)

    return send


def keys_command(*arguments: str, db: str) -> Result:
    """What became of ``inferneo keys``."""
    return CliRunner().invoke(app, ["keys", *arguments, "--db", db])


def printed(*arguments: str, db: str) -> str:
    """What ``inferneo keys`` printed, which must succeed."""
    done = keys_command(*arguments, db=db)
    assert done.exit_code == 0, done.exception
    return done.output
