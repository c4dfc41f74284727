"""How long a sequence may be."""

import dataclasses
import logging

import jax
import pytest

from inferneo_jax.models import REFERENCE
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.sharding.mesh import make_mesh
from tests.support.tiny_model import TINY, TINY_ENGINE


@pytest.mark.parametrize("over", [0, 1])
def test_more_than_the_models_context_is_not_had_and_is_told(
    caplog: pytest.LogCaptureFixture, over: int
) -> None:
    config = dataclasses.replace(TINY_ENGINE, max_len=TINY.context_length + over, kv_tokens=None)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with caplog.at_level(logging.WARNING, "inferneo_jax.runner.capacity"):
        programs = make_programs(TINY, config, mesh, REFERENCE, lambda: 2**30)
    assert programs.max_len == TINY.context_length
    assert [str(TINY.context_length) in record.message for record in caplog.records] == [
        True
    ] * over
