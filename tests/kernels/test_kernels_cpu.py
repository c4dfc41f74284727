"""The CPU's products against exact integers."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.kernels.cpu.linear import BlockQuantized
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.layers.quantization import EncodingError, Epilogue

F32 = jnp.dtype("float32")


pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


def _product(method: BlockQuantized, x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    stored = tuple(map(jnp.asarray, method.encode(matrix, table=False)))
    product = jax.jit(lambda x, stored: method.product(x, stored, table=False))
    return np.asarray(product(jnp.asarray(x), stored))[:, : matrix.shape[1]]


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _integers(rows: int, columns: int, group: int) -> np.ndarray:
    """Integers that are their own quantized values: each group's largest is 127."""
    values = np.random.default_rng(rows).integers(-127, 128, (rows, columns))
    values[:, ::group] = 127
    return values.astype(np.float32)


def _four_bits(inputs: int, outputs: int) -> np.ndarray:
    """A matrix as a file of 4 bits has it: scale times 0 to 15 plus a minimum, by 32 inputs."""
    rng = np.random.default_rng(inputs)
    groups = -(-inputs // 32)
    values = rng.integers(0, 16, (groups, 32, outputs))
    values[:, 0], values[:, 1] = 0, 15
    scales, minima = (
        (rng.random((groups, 1, outputs)) * factor).astype(np.float16).astype(np.float32)
        for factor in (0.02, -0.2)
    )
    return (values * scales + minima).reshape(-1, outputs).astype(np.float32)[:inputs]


def _rounded(x: np.ndarray) -> np.ndarray:
    """Rows as they are multiplied: every 64 values are multiples of their absmax / 127."""
    rows, columns = x.shape
    spans = np.pad(x, ((0, 0), (0, -columns % 64))).reshape(rows, -1, 64)
    most = np.abs(spans).max(axis=2, keepdims=True)
    values = np.rint(spans * (np.float32(127) / most)) * (most / np.float32(127))
    return values.reshape(rows, -1)[:, :columns]


def _matrix(bits: Literal[4, 8], inputs: int, outputs: int) -> np.ndarray:
    return _four_bits(inputs, outputs) if bits == 4 else _random(inputs, outputs)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 5), (192, 32), (128, 100)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_of_integers_is_exact(
    variant: Variant, bits: Literal[4, 8], inputs: int, outputs: int
) -> None:
    matrix = _integers(outputs, inputs, 32).T
    if bits == 4:
        matrix = np.clip(matrix, -11, 4)
        matrix[::32], matrix[1::32] = -11, 4
    method = BlockQuantized(F32, bits, variant)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 40):
        x = _integers(rows, inputs, 64)
        wanted = x.astype(np.int64) @ matrix.astype(np.int64)
        assert np.abs(wanted).max() < 2**24  # float32 holds it exactly
        np.testing.assert_array_equal(_product(method, x, matrix), wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_is_that_of_what_both_sides_are_rounded_to(
    variant: Variant, bits: Literal[4, 8]
) -> None:
    x, matrix = _random(9, 192), _matrix(bits, 192, 50)
    got = _product(BlockQuantized(F32, bits, variant), x, matrix)
    if bits == 8:
        groups = matrix.reshape(6, 32, 50)
        scales = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
        matrix = (np.rint(groups / scales) * scales).reshape(192, 50)
    np.testing.assert_allclose(got, _rounded(x) @ matrix, rtol=1e-4, atol=1e-4)


def test_rows_of_a_table_are_those_that_it_multiplies_with(variant: Variant) -> None:
    table = _random(50, 200)
    method = BlockQuantized(F32, variant=variant)
    stored = tuple(map(jnp.asarray, method.encode(table, table=True)))
    ids = jnp.asarray([[3, 49], [0, 3]])
    taken = np.asarray(method.take(stored, ids))[..., :200]
    steps = np.abs(np.pad(table, ((0, 0), (0, 24))).reshape(50, 7, 32)).max(2) / 127
    error = np.abs(taken - table[np.asarray(ids)])
    assert (error <= 0.51 * steps.repeat(32, 1)[:, :200][np.asarray(ids)]).all()
    one = np.eye(200, dtype=np.float32)  # each row gives one input of every output
    multiplied = np.asarray(method.product(jnp.asarray(one), stored, table=True))[:, :50].T
    np.testing.assert_allclose(multiplied[np.asarray(ids)], taken, rtol=1e-5)
    method.take(stored, jnp.asarray([-1, 99]))  # any row, and nothing beyond the table


def test_what_is_not_in_four_bits_is_refused() -> None:
    matrix = _four_bits(64, 40)
    BlockQuantized(F32, 4).encode(matrix, table=False)
    matrix[5, 7] += 0.001
    for wrong in (matrix, _random(64, 40)):
        with pytest.raises(EncodingError, match="not in groups of 4 bits"):
            BlockQuantized(F32, 4).encode(wrong, table=False)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_fused_gives_what_it_gives_apart(rows: int, bits: Literal[4, 8]) -> None:
    method = BlockQuantized(F32, bits)
    norm = RMSNorm(160, 1e-5)
    norm.scale.set_value(jnp.asarray(_random(160)))
    stored = tuple(map(jnp.asarray, method.encode(_matrix(bits, 160, 40), table=False)))
    residual = jnp.asarray(_random(rows, 40))
    for prologue, x in ((norm, _random(rows, 160)), (gate, _random(rows, 320))):
        apart = method.multiply(prologue(jnp.asarray(x)), stored, 40)
        for added in (None, residual):
            fused = method.multiply(
                jnp.asarray(x), stored, 40, prologue=prologue, epilogue=Epilogue(residual=added)
            )
            error = np.asarray(fused - (apart if added is None else apart + added))
            # A sum in another order may round a value of a row to its neighbour.
            assert np.abs(error).max() < 0.03
            assert np.abs(error).mean() < 1e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_a_feed_forward_block_gives_the_bits_of_two_products(
    variant: Variant, bits: Literal[4, 8]
) -> None:
    method = BlockQuantized(F32, bits, variant)
    norm = RMSNorm(96, 1e-5)
    norm.scale.set_value(jnp.asarray(_random(96)))
    gate_up, down = (
        tuple(map(jnp.asarray, method.encode(_matrix(bits, *shape), table=False)))
        for shape in ((96, 384), (192, 96))
    )

    @jax.jit
    def apart(x: jax.Array) -> jax.Array:
        both = method.multiply(x, gate_up, 384, prologue=norm)
        return method.multiply(both, down, 96, prologue=gate, epilogue=Epilogue(residual=x))

    whole = jax.jit(lambda x: method.feed_forward(x, norm, gate_up, down, method, 192))
    x = jnp.asarray(_random(300, 96))
    for rows in (1, 2, 3, 4, 7, 70, 300):
        np.testing.assert_array_equal(whole(x[:rows]), apart(x[:rows]))
    assert method.feed_forward(x, norm, gate_up, down, method, 190) is None  # not of whole spans


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(
    variant: Variant, bits: Literal[4, 8]
) -> None:
    method = BlockQuantized(F32, bits, variant)
    x = _random(300, 160)
    norm = RMSNorm(160, 1e-5)
    stored = tuple(map(jnp.asarray, method.encode(_matrix(bits, 160, 96), table=False)))
    multiply = jax.jit(lambda x: method.multiply(x, stored, 96, prologue=norm))
    whole = np.asarray(multiply(jnp.asarray(x)))
    for first, end in ((0, 1), (3, 5), (10, 13), (20, 24), (33, 70)):
        np.testing.assert_array_equal(multiply(jnp.asarray(x[first:end])), whole[first:end])


@pytest.mark.parametrize("prologue", [None, RMSNorm(160, 1e-5), gate])
def test_rows_of_zeros_are_left_out_and_change_no_other(variant: Variant, prologue: Any) -> None:
    method = BlockQuantized(F32, 8, variant)
    x, residual = _random(40, 320 if prologue is gate else 160), jnp.asarray(_random(40, 40))
    stored = tuple(map(jnp.asarray, method.encode(_matrix(8, 160, 40), table=False)))
    live = np.ones(40, bool)
    live[[0, 3, 4, 5, 17, 39]] = False
    some = method.multiply(
        x[live], stored, 40, prologue=prologue, epilogue=Epilogue(residual=residual[live])
    )
    x[~live] = 0
    x[5, ::2] = -0.0
    for added in (None, residual):
        mixed = method.multiply(x, stored, 40, prologue=prologue, epilogue=Epilogue(residual=added))
        assert (np.asarray(mixed)[~live] == (0 if added is None else added[~live])).all()
    np.testing.assert_array_equal(np.asarray(mixed)[live], some)
    nothing = method.multiply(
        x[~live], stored, 40, prologue=prologue, epilogue=Epilogue(residual=residual[~live])
    )
    np.testing.assert_array_equal(nothing, residual[~live])


def test_values_that_are_no_numbers_stay_in_their_rows() -> None:
    x = _random(4, 64)
    clean = _product(BlockQuantized(F32), x, _random(64, 32))
    x[1, 3], x[2, 5] = np.nan, np.inf
    dirty = _product(BlockQuantized(F32), x, _random(64, 32))
    np.testing.assert_array_equal(dirty[[0, 3]], clean[[0, 3]])
    assert not np.isfinite(dirty[[1, 2]]).any()
