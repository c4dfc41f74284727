"""Where a CPU's matrices are kept for its own kernels, and what an engine makes of them."""

import dataclasses
from typing import Any

import pytest

from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.engine.engine import Engine
from inferneo_jax.kernels.cpu import build
from inferneo_jax.kernels.cpu.build import library
from inferneo_jax.kernels.cpu.linear import BlockQuantized
from inferneo_jax.layers.quantization import Int8, Unquantized
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.sharding.mesh import make_mesh
from tests.support.tiny_model import (
    MIXED,
    NATIVE,
    ONE_DEVICE,
    TINY,
    TINY_ENGINE,
    close,
    make_runner,
    prompt,
    submit,
)

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, BlockQuantized),
        ({"kernels": "native"}, BlockQuantized),
        ({"kernels": "xla"}, Unquantized),
        ({"dtype": "float32"}, Unquantized),
        ({"quantization": "none"}, Unquantized),
        ({"quantization": "int8"}, Int8),
        ({"mesh": MeshShape(1, 2)}, Unquantized),
    ],
)
def test_a_cpu_keeps_matrices_for_its_kernels(changes: dict[str, Any], expected: type) -> None:
    config = EngineConfig(**({"mesh": ONE_DEVICE} | changes))
    backend = resolve_decoder(NATIVE, config, make_mesh(config.mesh))
    compact, quantization = backend.choices
    assert type(quantization.linear) is type(quantization.head) is expected
    assert getattr(compact.linear, "bits", None) == (4 if expected is BlockQuantized else None)
    assert compact.head == quantization.head


def test_without_a_library_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_MADE", {"native": None})
    backend = resolve_decoder(TINY, EngineConfig(), make_mesh(ONE_DEVICE))
    assert type(backend.quantization.linear) is Unquantized


def test_alone_is_batched_with_kernels() -> None:
    config = dataclasses.replace(
        TINY_ENGINE, slots=8, kv_tokens=640, row_buckets=(8,), prefill_chunks=(8,)
    )
    quantization = resolve_decoder(TINY, config, make_mesh(ONE_DEVICE)).quantization
    assert isinstance(quantization.linear, BlockQuantized)
    runner = make_runner(config, quantization=quantization)
    runner.compile()
    engine = Engine(runner)
    try:
        sent = [submit(engine, prompt(9 + i, seed=i), **f).wait() for i, f in enumerate(MIXED)]
        together = [submit(engine, prompt(9 + i, seed=i), **f) for i, f in enumerate(MIXED)]
        for got, wanted in zip(together, sent, strict=True):
            close(got.wait(), wanted)
        assert engine.stats().compiles_after_ready == 0
    finally:
        engine.stop()
