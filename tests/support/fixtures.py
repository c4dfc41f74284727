"""Fixtures for all tests that talk to a server with a fake engine."""

from collections.abc import Iterator

import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_server import CHAT, EMBED, Rig, as_new, make_tokenizer, running


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
    """The shared server with its engine as new."""
    with as_new(shared_rig.engine, tokenizer):
        yield shared_rig
