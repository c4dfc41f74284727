"""Where a CPU's matrices are kept for its own kernels."""

from typing import Any

import pytest

from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.kernels.cpu import build
from inferneo_jax.kernels.cpu.build import library
from inferneo_jax.kernels.cpu.linear import BlockQuantized
from inferneo_jax.layers.quantization import Int8, Unquantized
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.sharding.mesh import make_mesh
from tests.support.tiny_model import NATIVE, ONE_DEVICE, TINY

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
    backend = resolve_decoder(NATIVE, config, make_mesh(config.mesh), {})
    assert type(backend.quantization.linear) is type(backend.quantization.head) is expected


def test_without_a_library_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_MADE", {"native": None})
    backend = resolve_decoder(TINY, EngineConfig(), make_mesh(ONE_DEVICE), {})
    assert type(backend.quantization.linear) is Unquantized
