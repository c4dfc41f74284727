"""Native products of floats and attention within segments, against the reference's operations."""

import itertools
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.config import EncoderConfig, EngineConfig, MeshShape
from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.kernels.cpu.dense import CpuSegmentAttention, Packed
from inferneo_jax.layers.mlp import gelu
from inferneo_jax.layers.norm import LayerNorm
from inferneo_jax.layers.quantization import Epilogue, Unquantized
from inferneo_jax.layers.segments import SegmentAttention, Segments
from inferneo_jax.runner.backends import resolve_encoder
from inferneo_jax.sharding.mesh import make_mesh
from tests.support.tiny_model import ONE_DEVICE

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
needs_kernels = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


ENCODER = EncoderConfig(
    vocab_size=97,
    hidden_size=24,
    mlp_size=32,
    num_layers=1,
    num_heads=3,
    num_positions=64,
    max_tokens=64,
)


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), F32)


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x.astype(dtype).astype(F32)


def _norm(size: int) -> LayerNorm:
    norm = LayerNorm(size, 1e-5)
    norm.scale.set_value(_random(size))
    norm.bias.set_value(_random(size + 1)[:size])
    return norm


def _multiply(
    method: Packed | Unquantized,
    x: jax.Array,
    matrix: jax.Array,
    epilogue: Epilogue,
    live: int | None = None,
) -> np.ndarray:
    stored = tuple(map(jnp.asarray, method.encode(np.asarray(matrix), table=False)))
    count = None if live is None else jnp.int32(live)
    product = method.multiply(x, stored, matrix.shape[1], epilogue=epilogue, live=count)
    return np.asarray(product.astype(F32))


@cache
def _products(
    dtype: jnp.dtype, inputs: int, outputs: int
) -> list[tuple[jax.Array, Epilogue, np.ndarray]]:
    """Rows, what follows their product with the same matrix, and the reference's answer."""
    matrix, bias, found = _random(inputs, outputs) / 8, _random(outputs), []
    for rows in (1, 5, 12, 13, 150):
        # What is rounded already is multiplied as it is, where products are of wider numbers too.
        x, residual = _rounded(_random(rows, inputs), dtype), _random(rows, outputs)
        epilogues = (
            Epilogue(),
            Epilogue(bias, residual),
            Epilogue(bias, transform=gelu),
            Epilogue(bias, residual, _norm(outputs)),
            Epilogue(bias, transform=jnp.tanh),  # none that the kernel knows
        )
        found += [(x, each, _multiply(Unquantized(dtype), x, matrix, each)) for each in epilogues]
    return found


@needs_kernels
@DTYPES
def test_products_equal_the_reference(variant: Variant, dtype: jnp.dtype) -> None:
    sizes = [(37, 96)] if variant == "portable" else [(64, 5), (37, 96), (128, 100)]
    for inputs, outputs in sizes:
        matrix = _random(inputs, outputs) / 8
        for x, epilogue, wanted in _products(dtype, inputs, outputs):
            got = _multiply(Packed(dtype, variant), x, matrix, epilogue)
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_a_narrow_product_is_the_rounded_one(variant: Variant) -> None:
    x, matrix, bias = _random(9, 64), _random(64, 40), _random(40)
    method = Packed(BF16, variant)
    wide = _multiply(method, x, matrix, Epilogue(bias, transform=gelu))
    narrow = _multiply(method, x, matrix, Epilogue(bias, transform=gelu, dtype=BF16))
    np.testing.assert_array_equal(narrow, _rounded(jnp.asarray(wide), BF16))
    # What was narrowed is multiplied as if it had never been wide.
    again = _random(40, 33)
    np.testing.assert_array_equal(
        _multiply(method, jnp.asarray(narrow).astype(BF16), again, Epilogue()),
        _multiply(method, jnp.asarray(narrow), again, Epilogue()),
    )


@needs_kernels
@DTYPES
def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(
    variant: Variant, dtype: jnp.dtype
) -> None:
    x, matrix, residual = _random(300, 64), _random(64, 96), _random(300, 96)
    norm, method = _norm(96), Packed(dtype, variant)
    whole = _multiply(method, x, matrix, Epilogue(None, residual, norm))
    for first, end in ((0, 1), (3, 5), (10, 23), (33, 170)):
        epilogue = Epilogue(None, residual[first:end], norm)
        some = _multiply(method, x[first:end], matrix, epilogue)
        np.testing.assert_array_equal(some, whole[first:end])
    for live in (0, 1, 13, 100, 300):
        part = _multiply(method, x, matrix, Epilogue(None, residual, norm), live)
        np.testing.assert_array_equal(part[:live], whole[:live])


def test_gelu_is_exact_to_a_float_in_a_million() -> None:
    x = jnp.linspace(-12, 12, 4001)[:, None] * jnp.ones((1, 32))
    if library() is None:
        pytest.skip("needs a C++ compiler")
    got = _multiply(Packed(F32), x, jnp.eye(32), Epilogue(transform=gelu))
    wanted = np.asarray(jax.nn.gelu(x, approximate=False))
    assert np.abs(got - wanted).max() < 1e-6


def _segments(lengths: Sequence[int], size: int, empty: int = 3) -> Segments:
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    return Segments.of(jnp.asarray(cu_seqlens + [cu_seqlens[-1]] * empty, jnp.int32), size)


def _softmax_over_own_text(fused: jax.Array, lengths: Sequence[int]) -> np.ndarray:
    queries, keys, values = np.moveaxis(np.asarray(fused, np.float64), 1, 0)
    found, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        scores = np.einsum("qhd,khd->hqk", queries[own], keys[own]) * fused.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        found.append(np.einsum("hqk,khd->qhd", weights, values[own]))
        start += length
    return np.concatenate(found)


LENGTHS = [(16,), (1, 2, 3), (100, 1, 17, 90), (200, 129, 300), (640,), (1,) * 40]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_reference_attends_within_segments(lengths: tuple[int, ...]) -> None:
    size = 16 if sum(lengths) <= 16 else 640
    fused = _random(size, 3, 2, 8)
    got = np.asarray(SegmentAttention().attend(fused, _segments(lengths, size)))
    wanted = _softmax_over_own_text(fused, lengths)
    np.testing.assert_allclose(got[: sum(lengths)], wanted, atol=1e-5)
    assert np.isfinite(got).all()


@needs_kernels
@DTYPES
def test_native_attention_equals_the_reference(variant: Variant, dtype: jnp.dtype) -> None:
    head_dims = [7] if variant == "portable" else [7, 32, 40]
    for head_dim, lengths in itertools.product(head_dims, LENGTHS):
        size = 16 if sum(lengths) <= 16 else 640
        fused = _random(size, 3, 2, head_dim).astype(dtype)
        got = CpuSegmentAttention(variant).attend(fused, _segments(lengths, size))
        assert got.dtype == dtype
        wanted = _softmax_over_own_text(fused.astype(F32), lengths)
        error = np.abs(np.asarray(got.astype(F32))[: sum(lengths)] - wanted)
        assert error.max() < (1e-5 if dtype == F32 else 0.02)


@needs_kernels
@DTYPES
def test_a_text_gives_the_same_bits_whatever_texts_are_beside_it(dtype: jnp.dtype) -> None:
    lengths = (100, 1, 17, 90)
    fused = _random(256, 3, 2, 32).astype(dtype)
    together = np.asarray(CpuSegmentAttention().attend(fused, _segments(lengths, 256)).astype(F32))
    for i, length in enumerate(lengths):
        own = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
        alone = CpuSegmentAttention().attend(fused[own], _segments([length], length))
        np.testing.assert_array_equal(np.asarray(alone.astype(F32)), together[own])


def test_padding_that_is_no_number_stays_out_of_the_mean() -> None:
    texts = _segments((2, 3), 8)
    x = jnp.arange(16.0).reshape(8, 2).at[5:].set(jnp.nan)
    np.testing.assert_allclose(texts.mean(x)[:2], [[1.0, 2.0], [6.0, 7.0]], rtol=1e-6)
    np.testing.assert_array_equal(texts.mean(x)[2:], 0.0)


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "native"),
    [({}, True), ({"dtype": "float32"}, True), ({"kernels": "xla"}, False)],
)
def test_an_encoder_has_native_kernels_where_a_cpu_has(
    changes: dict[str, str], native: bool
) -> None:
    config = EngineConfig(mesh=ONE_DEVICE, **changes)  # type: ignore[arg-type]
    mesh = make_mesh(config.mesh)
    backend = resolve_encoder(ENCODER, config, mesh)
    assert isinstance(backend.quantization.linear, Packed if native else Unquantized)
    assert isinstance(backend.attention, CpuSegmentAttention) == backend.native == native
    split = resolve_encoder(ENCODER, config, make_mesh(MeshShape(1, 2)))
    assert isinstance(split.quantization.linear, Unquantized)
    assert type(split.attention) is SegmentAttention
