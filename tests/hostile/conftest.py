"""The fake engine's server with bodies and contexts of a usual size."""

from collections.abc import Iterator

import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_server import Rig, running

CONTEXT = 100_000


@pytest.fixture(scope="session")
def shared_rig(tokenizer: Tokenizer) -> Iterator[Rig]:
    with running(tokenizer, CONTEXT) as made:
        yield made
