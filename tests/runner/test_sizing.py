"""How long a sequence may be, and what is computed at once."""

import dataclasses
import logging

import pytest

from inferneo_jax.config import ACCELERATOR_SIZES, CPU_SIZES, BatchSizes, EngineConfig, MeshShape
from inferneo_jax.runner.backends import DecoderBackend
from inferneo_jax.runner.capacity import make_programs
from tests.support.tiny_model import ONE_DEVICE, TINY, TINY_ENGINE, tiny_backend


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


def test_sizes_are_those_of_the_device_unless_they_are_set() -> None:
    assert EngineConfig().batch_sizes("cpu") == CPU_SIZES
    for platform in ("gpu", "tpu"):
        assert EngineConfig().batch_sizes(platform) == ACCELERATOR_SIZES
    own = BatchSizes(slots=7, prefill_chunks=(16, 64), row_buckets=(8,))
    config = EngineConfig(**dataclasses.asdict(own))
    assert config.batch_sizes("cpu") == config.batch_sizes("tpu") == own


@pytest.mark.parametrize(
    ("data", "buckets", "slots"), [(3, None, 255), (1, (8,), 8), (512, None, 512)]
)
def test_slots_of_a_device_fit_the_groups_and_the_rows(
    data: int, buckets: tuple[int, ...] | None, slots: int
) -> None:
    config = EngineConfig(mesh=MeshShape(data), row_buckets=buckets)
    assert config.batch_sizes("tpu").slots == slots


def test_an_accelerator_has_eight_times_the_slots_and_chunks_in_as_many_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes seconds to compile for a real model, before a server is ready."""
    config = EngineConfig(mesh=ONE_DEVICE, kernels="xla")
    backend = tiny_backend(config)
    numbers = {}
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(DecoderBackend, "platform", platform)
        programs = make_programs(backend, config, lambda: 2**30)
        numbers[platform] = len(programs.all_keys())
        assert programs.prefill_shapes.max_rows == 8
    assert numbers["tpu"] < numbers["cpu"] < 60
