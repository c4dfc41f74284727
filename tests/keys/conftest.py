"""A server with keys, over a store of each kind."""

from collections.abc import Iterator

import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, EMBED, REPLY
from tests.support.key_stores import location, redis_url, store
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
    engine = served.engine
    engine.script, engine.limit, engine.failure = writes(tokenizer, REPLY), None, None
    engine.refusal = None
    engine.submitted.clear()
    yield served
    engine.release()
    engine.wait_until(lambda e: e.num_running == 0)
