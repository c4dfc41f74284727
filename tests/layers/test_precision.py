"""Products of float32 are float32 on every device, whatever its matrix units round them to."""

import jax
import jax.numpy as jnp
import pytest

from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.layers.segments import SegmentAttention, Segments
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import Decode, Key, Prefill
from tests.support.tiny_model import TINY, TINY_ENGINE, tiny_backend


def _products(lowered: jax.stages.Lowered) -> list[str]:
    """The matrix products of a program, as StableHLO writes them."""
    return [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.parametrize("key", [Decode(4), Prefill(1, 8)], ids=str)
def test_a_float32_decoder_asks_for_the_highest_precision(key: Key) -> None:
    products = _products(make_programs(tiny_backend(), TINY_ENGINE, lambda: 0).lower(key))
    assert len(products) > 6
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_bfloat16_decoder_multiplies_its_weights_in_one_pass() -> None:
    quantization = QuantizationConfig.unquantized("bfloat16")
    backend = tiny_backend(model=TINY, quantization=quantization)
    products = _products(make_programs(backend, TINY_ENGINE, lambda: 0).lower(Decode(4)))
    narrow = [line for line in products if "xbf16>" in line]
    assert len(narrow) == 4 + 1  # a layer's matrices, once for all layers, and the head
    assert not any("HIGHEST" in line for line in narrow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_within_texts_is_as_precise_as_the_encoder(dtype: str) -> None:
    fused = jnp.zeros((16, 3, 2, 8), dtype)
    segments = Segments.of(jnp.asarray([0, 9, 16]), 16)
    products = _products(jax.jit(SegmentAttention().attend).lower(fused, segments))
    assert len(products) == 2
    assert all(("HIGHEST" in line) == (dtype == "float32") for line in products)
