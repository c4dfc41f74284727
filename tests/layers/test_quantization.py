"""Quantization by weight: which method each matrix has, and what that costs when compiling."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from inferneo_jax import models
from inferneo_jax.layers.quantization import Int8, QuantizationConfig, Unquantized
from inferneo_jax.models.decoder import DecoderLayer
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import Decode
from tests.support.tiny_model import TINY, TINY_ENGINE, make_runner, tiny_backend

F32 = Unquantized(jnp.dtype("float32"))
INT8 = Int8(jnp.dtype("float32"))
WIDE = Unquantized(jnp.dtype("bfloat16"))
UNTIED = dataclasses.replace(TINY, num_layers=5, tie_embeddings=False)
MIXED = QuantizationConfig(INT8, INT8).excepting(
    {"layers.1.mlp.down.kernel": F32, "layers.3.mlp.down.kernel": F32, "embed.table": WIDE}
)


def test_each_weight_has_its_own_method() -> None:
    specs = models.weight_specs(UNTIED, MIXED)
    methods = {name: spec.method for name, spec in specs.items() if spec.inputs}
    assert {name for name, method in methods.items() if method == F32} == {
        "layers.1.mlp.down.kernel",
        "layers.3.mlp.down.kernel",
    }
    assert methods.pop("embed.table") == WIDE
    assert sum(method == INT8 for method in methods.values()) == 5 * 4 + 1 - 2


def test_a_tied_table_is_the_head() -> None:
    quantization = QuantizationConfig(F32, INT8)
    assert models.weight_specs(TINY, quantization)["embed.table"].method == INT8
    quantization = quantization.excepting({"embed.table": WIDE})
    assert models.weight_specs(TINY, quantization)["embed.table"].method == WIDE


def test_configurations_of_equal_content_are_equal() -> None:
    one = QuantizationConfig(F32, F32).excepting({"a": INT8}).excepting({"b": WIDE, "a": WIDE})
    other = QuantizationConfig(F32, F32).excepting({"b": WIDE, "a": WIDE})
    assert one == other
    assert hash(one) == hash(other)
    assert one != QuantizationConfig(F32, F32).excepting({"a": WIDE})


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (QuantizationConfig(F32, WIDE), "none"),
        (QuantizationConfig(F32, INT8), "int8"),
        (MIXED, "int8"),
    ],
)
def test_a_model_is_called_by_the_formats_of_its_matrices(
    quantization: QuantizationConfig, name: str
) -> None:
    assert make_runner(quantization=quantization).info().quantization == name


def test_layers_are_traced_once_for_each_set_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    call = DecoderLayer.__call__

    def counted(self: DecoderLayer, *arguments: object) -> object:
        traced.append(self.mlp.down.method)
        return call(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    jax.clear_caches()
    programs = make_programs(tiny_backend(model=UNTIED, quantization=MIXED), TINY_ENGINE, lambda: 0)
    programs.lower(Decode(4))
    assert traced == [INT8, F32]
