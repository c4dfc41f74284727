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


@pytest.mark.parametrize("more", [0, 1, TINY_ENGINE.page_len - 1])
def test_memory_for_less_than_the_context_gives_sequences_of_whole_pages(more: int) -> None:
    config = dataclasses.replace(TINY_ENGINE, max_len=None, kv_tokens=None)
    backend = tiny_backend(config)
    token_bytes = make_programs(backend, config, lambda: 2**30).cache_bytes // (
        (config.slots * TINY.context_length) + TINY_ENGINE.page_len
    )
    programs = make_programs(backend, config, lambda: token_bytes * (32 + more))
    assert programs.max_len == 32
    assert programs.num_pages == 32 // TINY_ENGINE.page_len + 1
