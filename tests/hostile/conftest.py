"""The fake engine's server with bodies and contexts of a usual size."""

from collections.abc import Iterator

import pytest
from fixtures import rig, tokenizer
from harness import Rig, running

from inferneo_jax import Tokenizer

__all__ = ["rig", "shared_rig", "tokenizer"]
CONTEXT = 100_000


@pytest.fixture(scope="session")
def shared_rig(tokenizer: Tokenizer) -> Iterator[Rig]:
    with running(tokenizer, CONTEXT) as made:
        yield made
