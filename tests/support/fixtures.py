"""Fixtures for all tests that talk to a server with a fake engine."""

from collections.abc import Iterator

import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig, make_tokenizer, running


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def shared_rig(tokenizer: Tokenizer) -> Iterator[Rig]:
    aliases = {"gpt-4o": CHAT, "text-embedding-ada-002": EMBED}
    origins = ("https://page.example",)
    with running(
        tokenizer, aliases=aliases, max_body_bytes=256 * 1024, allowed_origins=origins
    ) as rig:
        yield rig


@pytest.fixture
def rig(shared_rig: Rig, tokenizer: Tokenizer) -> Iterator[Rig]:
    """The shared server with its engine as new; afterwards nothing may be left running."""
    engine = shared_rig.engine
    engine.script = writes(tokenizer, REPLY)
    engine.batch, engine.limit, engine.refusal, engine.failure = 1, None, None, None
    engine.submitted.clear()
    engine.aborted.clear()
    engine.finished.clear()
    yield shared_rig
    engine.release()
    engine.wait_until(lambda e: e.num_running == 0)
