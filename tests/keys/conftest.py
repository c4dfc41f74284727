"""A server with keys, over a store of each kind."""

import io
import sys
from collections.abc import Iterator

import pytest

from inferneo_jax import Tokenizer
from server.observe import log
from tests.support.fake_server import CHAT, EMBED, as_new
from tests.support.key_stores import KINDS, empty_store, location, redis_url, store
from tests.support.keyed_server import KeyRig, key_rig

__all__ = ["location", "redis_url", "store"]


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyRig]:
    location = str(tmp_path_factory.mktemp("keys") / "keys.db")
    aliases = {"gpt-4o": CHAT, "ada": EMBED}
    with key_rig(tokenizer, location, require_key="true", aliases=aliases) as found:
        yield found


@pytest.fixture
def rig(served: KeyRig, tokenizer: Tokenizer) -> Iterator[KeyRig]:
    """The module's server, requiring keys, with its engine as new."""
    with as_new(served.engine, tokenizer):
        yield served


@pytest.fixture(scope="module", params=KINDS)
def administered(
    request: pytest.FixtureRequest,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[KeyRig]:
    """A server that an administrator may be at, over each store."""
    with key_rig(tokenizer, empty_store(request, tmp_path_factory.mktemp("keys"))) as found:
        yield found


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the servers of this process log from now on."""
    written = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", written)
        log.configure("json")
        yield written
    log.configure("json")
