"""A whole server on tiny random models, in a process of its own."""

import pytest

from tests.support.key_stores import location, redis_url
from tests.support.tiny_checkpoints import tiny_checkpoints

__all__ = ["location", "redis_url"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Its settings; what it compiles is kept for the next."""
    return tiny_checkpoints(tmp_path_factory.mktemp("tiny"))
