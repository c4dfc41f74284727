"""Threads, and both ends of a connection."""

from collections.abc import Iterator

import pytest

from inferneo_jax.distributed.transport import Channel
from tests.distributed.process_groups import CONFIG, Threads, connected


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made._pool.shutdown()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ends = [Channel(each, CONFIG.lost_seconds) for each in connected()]
    yield ends[0], ends[1]
    for each in ends:
        each.close()
