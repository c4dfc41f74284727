"""How long a sequence may be."""

import dataclasses
import logging

import pytest

from inferneo_jax.runner.capacity import make_programs
from tests.support.tiny_model import TINY, TINY_ENGINE, tiny_backend


@pytest.mark.parametrize("over", [0, 1])
def test_more_than_the_models_context_is_not_had_and_is_told(
    caplog: pytest.LogCaptureFixture, over: int
) -> None:
    config = dataclasses.replace(TINY_ENGINE, max_len=TINY.context_length + over, kv_tokens=None)
    with caplog.at_level(logging.WARNING, "inferneo_jax.runner.capacity"):
        programs = make_programs(tiny_backend(config), config, lambda: 2**30)
    assert programs.max_len == TINY.context_length
    assert [str(TINY.context_length) in record.message for record in caplog.records] == [
        True
    ] * over
