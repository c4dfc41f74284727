"""The CPU's products against exact integers, and its blocks against the ``gguf`` library's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.kernels.cpu.linear import FORMATS, BlockQuantized
from inferneo_jax.layers.blocks import BlockPart, BlockRows
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.layers.quantization import EncodingError, Epilogue, Stored
from tests.support.block_files import block_inputs, blocks_of, dequantized, random_rows

F32 = jnp.dtype("float32")


pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


def _stored(
    blocks: tuple[BlockRows, ...], variant: Variant = "native"
) -> tuple[BlockQuantized, Stored]:
    """A method for blocks, and their parameters."""
    method = BlockQuantized(F32, tuple(rows.part for rows in blocks), variant)
    assert method.stores(method.parts)
    encoded = method.encode_blocks(blocks)
    inputs = dequantized(blocks[0].part.format, blocks[0].tensors[0][:1]).shape[1]
    outputs = sum(count for part in method.parts for _, count in part.runs)
    wanted = method.parameters((inputs, outputs), (None, None), table=False)
    assert [each.shape for each in encoded] == [each.shape for each in wanted]
    return method, tuple(map(jnp.asarray, encoded))


def _rounded_to_8_bits(matrix: np.ndarray, variant: Variant) -> tuple[BlockQuantized, Stored]:
    method = BlockQuantized(F32, variant=variant)
    return method, tuple(map(jnp.asarray, method.encode(matrix, table=False)))


def _product(method: BlockQuantized, x: np.ndarray, stored: Stored, outputs: int) -> np.ndarray:
    product = jax.jit(lambda x, stored: method.multiply(x, stored, outputs))
    return np.asarray(product(jnp.asarray(x), stored))


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _integers(rows: int, columns: int, group: int) -> np.ndarray:
    """Integers that are their own quantized values: each group's largest is 127."""
    values = np.random.default_rng(rows).integers(-127, 128, (rows, columns))
    values[:, ::group] = 127
    return values.astype(np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
    """Rows as they are multiplied: every 32 values are multiples of their absmax / 127."""
    rows, columns = x.shape
    spans = np.pad(x, ((0, 0), (0, -columns % 32))).reshape(rows, -1, 32)
    most = np.abs(spans).max(axis=2, keepdims=True)
    values = np.rint(spans * (np.float32(127) / most)) * (most / np.float32(127))
    return values.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_that_the_gguf_library_reads(variant: Variant, name: str) -> None:
    for inputs in (block_inputs(name), 3 * block_inputs(name)):
        rows = random_rows(name, 70, inputs)
        method, table = _stored(blocks_of(name, rows), variant)
        ids = jnp.asarray([[3, 69, 32], [0, 31, 3]])
        taken = np.asarray(method.take(table, ids))
        np.testing.assert_array_equal(taken[..., :inputs], dequantized(name, rows)[ids])
        assert not taken[..., inputs:].any()
        method.take(table, jnp.asarray([-1, 99]))  # any row, and nothing beyond the table


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_of_integers_is_exact(variant: Variant, name: str) -> None:
    """With scales of 1, weights are integers."""
    for outputs, inputs in ((5, 256), (32, 512), (100, block_inputs(name))):
        rows = random_rows(name, outputs, inputs, scale=1)
        matrix = dequantized(name, rows).T
        method, stored = _stored(blocks_of(name, rows), variant)
        multiply = jax.jit(partial(method.multiply, stored=stored, outputs=outputs))
        for count in (1, 2, 3, 4, 5, 6, 7, 13, 40):
            x = np.zeros((40, inputs), np.float32)  # rows of zeros are left out
            x[:count] = _integers(count, inputs, 32)
            wanted = x.astype(np.int64) @ matrix.astype(np.int64)
            assert np.abs(wanted).max() < 2**24  # float32 holds it exactly
            np.testing.assert_array_equal(multiply(x), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_rounded_row_in_every_variant(variant: Variant, name: str) -> None:
    x, rows = _random(140, 768), random_rows(name, 50, 768)
    method, stored = _stored(blocks_of(name, rows), variant)
    got = _product(method, x, stored, 50)
    weights = dequantized(name, rows).astype(np.float64)
    # float32 sums of 768 products
    error = np.abs(_rounded(x)) @ np.abs(weights.T) * 3e-6
    assert (np.abs(got - _rounded(x).astype(np.float64) @ weights.T) <= error).all()
    reference, stored = _stored(blocks_of(name, rows))
    np.testing.assert_array_equal(got, _product(reference, x, stored, 50))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(variant: Variant, name: str) -> None:
    x = _random(140, 256)
    norm = RMSNorm(256, 1e-5)
    method, stored = _stored(blocks_of(name, random_rows(name, 96, 256)), variant)
    multiply = jax.jit(lambda x: method.multiply(x, stored, 96, prologue=norm))
    whole = np.asarray(multiply(x))
    for first, end in ((0, 1), (3, 5), (10, 13), (20, 24), (33, 70)):
        alone = np.zeros_like(x)  # rows of zeros are left out
        alone[first:end] = x[first:end]
        np.testing.assert_array_equal(multiply(alone)[first:end], whole[first:end])


def _mixed() -> tuple[tuple[BlockRows, ...], np.ndarray]:
    """A matrix of two formats, whose outputs take turns and are not stored in their order."""
    first, second = random_rows("q4_k", 90, 256), random_rows("q6_k", 40, 256)
    blocks = (
        BlockRows(BlockPart("q4_k", ((84, 40), (0, 50))), (first[:30], first[30:])),
        BlockRows(BlockPart("q6_k", ((50, 34), (124, 6))), (second,)),
    )
    matrix = np.empty((256, 130), np.float32)
    matrix[:, 84:124], matrix[:, :50] = np.split(dequantized("q4_k", first).T, [40], axis=1)
    matrix[:, 50:84], matrix[:, 124:] = np.split(dequantized("q6_k", second).T, [34], axis=1)
    return blocks, matrix


def test_one_matrix_may_have_several_formats(variant: Variant) -> None:
    blocks, matrix = _mixed()
    method, stored = _stored(blocks, variant)
    assert method.name == "q4_k+q6_k"
    x = _random(9, 256)
    for rows in (1, 9):
        got = _product(method, x[:rows], stored, 130)
        np.testing.assert_allclose(got, _rounded(x[:rows]) @ matrix, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(method.take(stored, jnp.arange(130)), matrix.T)


def test_floats_are_rounded_to_eight_bits(variant: Variant) -> None:
    matrix = _random(200, 50)
    matrix[:32, 7] = 0
    padded = np.pad(matrix, ((0, 24), (0, 0))).reshape(7, 32, 50)
    scales = (np.abs(padded).max(1, keepdims=True) / np.float32(127)).astype(np.float16)
    steps = np.maximum(scales.astype(np.float32), np.float32(1e-30))
    wanted = (np.clip(np.rint(padded / steps), -127, 127) * steps).reshape(224, 50)[:200].T
    method = BlockQuantized(F32, variant=variant)
    assert not method.stores(None)
    encoded = method.encode(matrix, table=False)
    taken = np.asarray(method.take(tuple(map(jnp.asarray, encoded)), jnp.arange(50)))
    np.testing.assert_array_equal(taken[:, :200], wanted)
    for same in (np.asfortranarray(matrix), np.ascontiguousarray(matrix.T).T):
        np.testing.assert_array_equal(method.encode(same, table=False)[0], encoded[0])
    np.testing.assert_array_equal(method.encode(matrix.T, table=True)[0], encoded[0])
    for dtype in (jnp.bfloat16, np.float16):
        narrow = matrix.astype(dtype)
        np.testing.assert_array_equal(
            method.encode(narrow, table=False)[0],
            method.encode(narrow.astype(np.float32), table=False)[0],
        )


def test_blocks_are_not_made_of_floats() -> None:
    method = BlockQuantized(F32, (BlockPart("q4_k", ((0, 32),)),))
    with pytest.raises(EncodingError, match="floats are rounded to q8_0, not to q4_k"):
        method.encode(_random(256, 32), table=False)


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_is_fused_gives_what_it_gives_apart(rows: int) -> None:
    method, stored = _rounded_to_8_bits(_random(160, 40), "native")
    norm = RMSNorm(160, 1e-5)
    norm.scale.set_value(jnp.asarray(_random(160)))
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


_ONE_FORMAT = blocks_of("q5_0", random_rows("q5_0", 512, 256))
_TWO_FORMATS = (
    BlockRows(BlockPart("q4_k", ((0, 256),)), (random_rows("q4_k", 256, 256),)),
    BlockRows(BlockPart("q8_0", ((256, 256),)), (random_rows("q8_0", 256, 256),)),
)


@pytest.mark.parametrize("ups", [_ONE_FORMAT, _TWO_FORMATS])
def test_a_feed_forward_block_gives_the_bits_of_two_products(
    variant: Variant, ups: tuple[BlockRows, ...]
) -> None:
    norm = RMSNorm(256, 1e-5)
    norm.scale.set_value(jnp.asarray(_random(256)))
    method, gate_up = _stored(ups, variant)
    after, down = _stored(blocks_of("q6_k", random_rows("q6_k", 256, 256)), variant)

    @jax.jit
    def apart(x: jax.Array) -> jax.Array:
        both = method.multiply(x, gate_up, 512, prologue=norm)
        return after.multiply(both, down, 256, prologue=gate, epilogue=Epilogue(residual=x))

    whole = jax.jit(lambda x: method.feed_forward(x, norm, gate_up, down, after, 256))
    x = jnp.asarray(_random(300, 256))
    for rows in (1, 2, 3, 4, 7, 70, 300):
        np.testing.assert_array_equal(whole(x[:rows]), apart(x[:rows]))
    rounded = BlockQuantized(F32, variant=variant)
    assert rounded.feed_forward(x, norm, gate_up, down, after, 190) is None  # not of whole spans
    other: Any = object()
    assert method.feed_forward(x, norm, gate_up, down, other, 256) is None


@pytest.mark.parametrize("prologue", [None, RMSNorm(160, 1e-5), gate])
def test_rows_of_zeros_are_left_out_and_change_no_other(variant: Variant, prologue: Any) -> None:
    method, stored = _rounded_to_8_bits(_random(160, 40), variant)
    x, residual = _random(40, 320 if prologue is gate else 160), jnp.asarray(_random(40, 40))
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
    method, stored = _rounded_to_8_bits(_random(64, 32), "native")
    clean = _product(method, x, stored, 32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    dirty = _product(method, x, stored, 32)
    np.testing.assert_array_equal(dirty[[0, 3]], clean[[0, 3]])
    assert not np.isfinite(dirty[[1, 2]]).any()
