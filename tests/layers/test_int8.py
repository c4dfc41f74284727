"""Weights, keys and values of 8 bits: exact by their definition, close to what they stand for."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.errors import ConfigError
from inferneo_jax.kernels import attention_for
from inferneo_jax.layers.cache import PagedAttention
from inferneo_jax.layers.quantization import EightBit, Fp8, Int8, QuantizationConfig
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import Prefill, ScorePrompt
from inferneo_jax.sharding.mesh import make_mesh, parts
from inferneo_jax.sharding.padding import pad_for_mesh
from inferneo_jax.weights.placement import weight_shapes
from tests.support.tiny_model import (
    EIGHT_SLOTS,
    ONE_DEVICE,
    TINY,
    prompt,
    running_engine,
    submit,
    tiny_backend,
    tiny_weights,
)

F32 = jnp.dtype("float32")


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _int8(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
    return np.rint(x / scales), scales


def _fp8(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to the nearest of all numbers of E4M3, the even one in the middle of two."""
    exponents, digits = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    normal = (1 + digits / 8) * 2.0 ** (exponents - 7)
    grid = np.where(exponents > 0, normal, digits / 8 * 2.0**-6).ravel()[:-1]  # the last is NaN
    scales = np.abs(x).max(axis=axis, keepdims=True) / np.float32(448)
    scaled = np.abs(x / scales)
    above = np.clip(np.searchsorted(grid, scaled), 1, len(grid) - 1)
    low, high = scaled - grid[above - 1], grid[above] - scaled
    even = above - 1 + above % 2
    nearest = np.where(low == high, even, np.where(low < high, above - 1, above))
    return np.sign(x) * grid[nearest], scales


ROUNDED = {Int8: _int8, Fp8: _fp8}


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("table", [False, True])
def test_a_product_is_the_product_of_what_both_sides_are_rounded_to(
    kind: type[EightBit], rows: int, table: bool
) -> None:
    x, matrix = _random(rows, 40), _random(40, 24)
    method = kind(F32)
    stored = tuple(map(jnp.asarray, method.encode(matrix.T if table else matrix, table=table)))
    (xs, x_scales), (ws, w_scales) = ROUNDED[kind](x, 1), ROUNDED[kind](matrix, 0)
    wanted = (xs @ ws) * x_scales * w_scales
    got = method.product(jnp.asarray(x), stored, table=table)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    weights_only = dataclasses.replace(method, products="float")
    got = weights_only.product(jnp.asarray(x), stored, table=table)
    np.testing.assert_allclose(got, x @ (ws * w_scales), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ROUNDED)
def test_rows_of_a_table_are_those_that_it_multiplies_with(kind: type[EightBit]) -> None:
    table = _random(24, 40)
    method = kind(F32)
    stored = tuple(map(jnp.asarray, method.encode(table, table=True)))
    ids = jnp.asarray([[3, 0], [23, 3]])
    values, scales = ROUNDED[kind](table, 1)
    np.testing.assert_allclose(method.take(stored, ids), (values * scales)[ids], rtol=1e-6)


@pytest.mark.parametrize("kind", ROUNDED)
def test_zeros_stay_zeros(kind: type[EightBit]) -> None:
    stored = tuple(map(jnp.asarray, kind(F32).encode(np.zeros((8, 4), np.float32), table=False)))
    product = kind(F32).product(jnp.zeros((2, 8)), stored, table=False)
    assert not np.asarray(product).any()


def _by_weight(shape: MeshShape, quantization: QuantizationConfig) -> dict[str, list[jax.Array]]:
    """The tiny model's arrays on a mesh, by the weight that they make up."""
    arrays = iter(tiny_weights(TINY, shape, quantization))
    mesh = make_mesh(shape)
    shapes = weight_shapes(pad_for_mesh(TINY, parts(mesh, "heads")), mesh, quantization)
    return {name: list(itertools.islice(arrays, len(each))) for name, each in shapes.items()}


@pytest.mark.parametrize("shape", [MeshShape(1, 1), MeshShape(1, 8), MeshShape(2, 4)], ids=str)
def test_each_device_has_the_scales_of_its_own_part(shape: MeshShape) -> None:
    shards = make_mesh(shape).shape["model"]
    unquantized = _by_weight(shape, models.REFERENCE)
    int8 = QuantizationConfig.eight_bit("int8", F32, shards, "native")
    for name, arrays in _by_weight(shape, int8).items():
        if len(arrays) == 1:
            continue  # a vector
        values, scales = arrays
        assert values.dtype == jnp.int8
        for got, factor, wanted in zip(
            values.addressable_shards,
            scales.addressable_shards,
            unquantized[name][0].addressable_shards,
            strict=True,
        ):
            scale = np.asarray(factor.data).T
            exact = np.asarray(wanted.data) if name == "embed.table" else np.asarray(wanted.data).T
            error = np.abs(np.asarray(got.data, np.float32) * scale - exact)
            assert (error <= scale * 0.501).all()


def test_both_sides_of_a_product_have_their_inputs_last() -> None:
    """Tensor cores of GPUs take int8 in no other order; XLA would transpose the whole matrix."""
    model = dataclasses.replace(TINY, tie_embeddings=False)
    config = dataclasses.replace(EIGHT_SLOTS, mesh=ONE_DEVICE)
    backend = tiny_backend(config, model, QuantizationConfig.eight_bit("int8", F32, 1, "native"))
    programs = make_programs(backend, config, lambda: 0)
    lowered = [programs.lower(key).as_text() for key in (Prefill(1, 8), ScorePrompt(8))]
    lines = [line for each in lowered for line in each.splitlines()]
    products = [line for line in lines if "dot_general" in line and "xi8>" in line]
    assert len(products) == 4 + 2  # a layer's matrices, and the head, of scored tokens too
    assert all("contracting_dims = [1] x [1]" in line for line in products)


@pytest.mark.parametrize(
    ("numbers", "shape", "correlation"),
    [
        ("int8", ONE_DEVICE, 0.99),
        ("int8", MeshShape(2, 4), 0.99),
        ("fp8", MeshShape(2, 4), 0.95),  # four digits of each weight, where int8 has seven
    ],
    ids=str,
)
def test_8_bits_score_a_prompt_nearly_as_float32_does(
    numbers: str, shape: MeshShape, correlation: float
) -> None:
    scores = {}
    for name in ("none", numbers):
        changes = {"quantization": name, "kv_dtype": "int8" if name == "int8" else "auto"}
        config = dataclasses.replace(EIGHT_SLOTS, dtype="float32", mesh=shape, **changes)
        quantization = resolve_decoder(TINY, config, make_mesh(shape), {}).quantization
        with running_engine(config, quantization=quantization) as engine:
            sent = [submit(engine, prompt(40, seed=i), 1, prompt_logprobs=0) for i in range(4)]
            outputs = [each.wait().outputs[0].prompt_logprobs for each in sent]
        scores[name] = np.array([[p.logprob for p in each[1:]] for each in outputs])
    change = scores[numbers] - scores["none"]
    assert change.any()
    assert abs(change.mean()) < 0.05
    assert np.corrcoef(scores[numbers].ravel(), scores["none"].ravel())[0, 1] > correlation


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "float32"),
        ({"kv_dtype": "int8"}, "int8"),
        ({"kv_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_cache_has_the_numbers_that_are_asked_for(
    changes: dict[str, Any], expected: str
) -> None:
    config = EngineConfig(mesh=ONE_DEVICE, **changes)
    assert tiny_backend(config).kv_dtype == expected


@pytest.mark.parametrize(
    ("device", "native"),
    [
        (("tpu", "TPU v3"), ()),
        (("tpu", "TPU v5 lite"), ("int8",)),
        (("tpu", "TPU v6 lite"), ("int8",)),
        (("tpu", "TPU7x"), ("int8", "fp8")),
        (("cuda", "V100", "7.0"), ()),
        (("cuda", "A100", "8.0"), ("int8",)),
        (("cuda", "L4", "8.9"), ("int8", "fp8")),
        (("cuda", "H100", "9.0"), ("int8", "fp8")),
    ],
    ids=str,
)
def test_products_are_of_8_bits_where_the_chip_has_them(
    device: tuple[str, ...], native: tuple[str, ...]
) -> None:
    platform, kind, capability = (*device, "")[:3]
    made = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    mesh: Any = SimpleNamespace(
        devices=np.array([[made]], dtype=object), shape={"data": 1, "model": 1}
    )
    found: tuple[str, ...] = ()
    for name, method in (("int8", Int8), ("fp8", Fp8)):
        config = EngineConfig(quantization=name)
        linear = resolve_decoder(TINY, config, mesh, {}).quantization.linear
        assert isinstance(linear, method)
        if linear.products == "native":
            found += (name,)
    assert found == native


def test_kernels_that_there_are_not_are_refused() -> None:
    old: Any = SimpleNamespace(platform="cuda", compute_capability="7.0", device_kind="Tesla V100")
    sizes = {"head_dim": 64, "page_len": 16}
    assert attention_for(old, "auto", **sizes) is PagedAttention
    with pytest.raises(ConfigError, match="there are none for Tesla V100; set auto or xla"):
        attention_for(old, "native", **sizes)
    ampere: Any = SimpleNamespace(platform="cuda", compute_capability="8.0", device_kind="A100")
    with pytest.raises(ConfigError, match="kv_dtype is fp8, which A100 does not convert; set auto"):
        attention_for(ampere, "native", **sizes, fp8=True)
