"""The TPU kernels, interpreted, against attention in plain XLA operations."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from inferneo_jax.config import DecoderConfig
from inferneo_jax.kernels.tpu.attention import TpuPagedAttention
from inferneo_jax.layers.cache import (
    PLAIN,
    AttentionMetadata,
    AttentionVariant,
    LayerCache,
    PagedAttention,
    narrow,
)
from inferneo_jax.layers.quantization import quantize
from tests.support.tiny_model import TINY

ONE_LAYER = DecoderConfig.from_dict(TINY.to_dict() | {"num_layers": 1})
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "int8": 2e-2, "float8_e4m3fn": 2e-2}
MAX_PAGES = 6
VARIANTS = {
    "plain": PLAIN,
    "window": AttentionVariant(window=5),
    "softcap": AttentionVariant(softcap=2.0),
    "all": AttentionVariant(window=40, softcap=3.0),  # and sinks
}
# Interpreted kernels are long programs for small arrays.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _pair(
    head_dim: int, kv_heads: int, page_len: int, dtype: str, block_len: int = 256
) -> tuple[PagedAttention, TpuPagedAttention]:
    sizes = (kv_heads, head_dim, page_len, jnp.dtype(dtype), block_len)
    return PagedAttention(*sizes), TpuPagedAttention(*sizes, interpret=True)


def _metadata(page_len: int, tokens: int) -> AttentionMetadata:
    """An empty row, one that continues shared pages, a longer one, and padding, in mixed pages."""
    pages = np.random.default_rng(1).permutation(np.arange(1, 4 * MAX_PAGES)).astype(np.int32)
    block_tables = np.zeros((4, MAX_PAGES), np.int32)
    block_tables[:3] = pages[: 3 * MAX_PAGES].reshape(3, MAX_PAGES)
    block_tables[1, :2] = block_tables[0, :2]
    starts = [0, 2 * page_len, 3 * page_len - 1, 0]
    for row, start in enumerate(starts):
        block_tables[row, (start + tokens - 1) // page_len + 1 :] = 0
    block_tables[3] = 0
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(tokens, dtype=np.int32)
    return AttentionMetadata(jnp.asarray(block_tables), jnp.asarray(positions))


def _draw(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _filled(rng: np.random.Generator, attention: PagedAttention) -> LayerCache:
    empty = attention.init(ONE_LAYER, 4 * MAX_PAGES)[0]
    keys, values = _draw(rng, *empty.keys.shape), _draw(rng, *empty.values.shape)
    if attention.dtype != jnp.int8:
        return LayerCache(narrow(keys, attention.dtype), narrow(values, attention.dtype))
    (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
    return LayerCache(keys, values, key_scales[:, :, None], value_scales[:, :, None])


def _for_tpu(tpu: TpuPagedAttention, layer: LayerCache) -> LayerCache:
    """The same contents where the kernels expect them."""
    empty = tpu.init(ONE_LAYER, len(layer.keys))[0]
    if tpu.packed:
        both = jnp.concatenate([layer.keys, layer.values], axis=-1)
        layer = layer._replace(keys=both, values=empty.values)
    return jax.tree.map(
        lambda old, new: jnp.pad(
            old, [(0, b - a) for a, b in zip(old.shape, new.shape, strict=True)]
        ),
        layer,
        empty,
    )


@partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICKLY)
def _step(
    attention: PagedAttention,
    cache: LayerCache,
    new: tuple[jax.Array, ...],
    metadata: AttentionMetadata,
    name: str = "plain",
) -> tuple[LayerCache, jax.Array]:
    keys, values, queries = new
    cache = attention.write(cache, keys, values, metadata)
    variant = VARIANTS[name]
    if name == "all":
        shape = queries.shape[2:4]
        variant = variant._replace(sinks=jnp.linspace(-2, 2, math.prod(shape)).reshape(shape))
    return cache, attention.attend(queries, cache, metadata, variant)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_len", "tokens", "dtype"),
    [
        (64, 3, 3, 16, 1, "float32"),
        (64, 2, 7, 16, 40, "bfloat16"),
        (64, 1, 2, 48, 20, "bfloat16"),
        (64, 1, 4, 128, 5, "int8"),
        (80, 5, 1, 32, 1, "bfloat16"),
        (80, 1, 71, 16, 33, "float32"),
        (96, 2, 9, 16, 17, "int8"),
        (128, 1, 8, 128, 1, "float32"),
        (128, 8, 4, 32, 64, "bfloat16"),
        (128, 3, 5, 64, 1, "int8"),
        (256, 2, 6, 64, 70, "float32"),
    ],
)
def test_kernels_equal_the_reference(
    head_dim: int, kv_heads: int, group: int, page_len: int, tokens: int, dtype: str
) -> None:
    _compare(head_dim, kv_heads, group, page_len, tokens, dtype)


@pytest.mark.parametrize("block_len", [16, 32, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_kernels_equal_the_reference_in_every_variant(
    tokens: int, variant: str, block_len: int
) -> None:
    _compare(64, 2, 3, 16, tokens, "float32", variant, block_len)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_kernels_equal_the_reference_for_every_head_size_and_dtype(
    head_dim: int, dtype: str
) -> None:
    _compare(head_dim, 1, 3, 32, 2, dtype, "all")


def _compare(
    head_dim: int,
    kv_heads: int,
    group: int,
    page_len: int,
    tokens: int,
    dtype: str,
    variant: str = "plain",
    block_len: int = 256,
) -> None:
    reference, tpu = _pair(head_dim, kv_heads, page_len, dtype, block_len)
    rng, metadata = np.random.default_rng(0), _metadata(page_len, tokens)
    new = (
        _draw(rng, 4, tokens, kv_heads, head_dim),
        _draw(rng, 4, tokens, kv_heads, head_dim),
        _draw(rng, 4, tokens, kv_heads, group, head_dim),
    )
    layer = _filled(rng, reference)
    expected_cache, expected = _step(reference, layer, new, metadata, variant)
    cache, mixed = _step(tpu, _for_tpu(tpu, layer), new, metadata, variant)

    assert mixed.dtype == jnp.float32
    assert mixed.shape == expected.shape
    np.testing.assert_allclose(mixed[:3], expected[:3], atol=TOLERANCE[dtype])
    assert np.isfinite(mixed).all()
    for got, wanted in zip(
        jax.tree.leaves(cache), jax.tree.leaves(_for_tpu(tpu, expected_cache)), strict=True
    ):
        np.testing.assert_array_equal(got[1:], wanted[1:])  # anything may be on page 0


@pytest.mark.parametrize("tokens", [1, 20])
def test_only_live_pages_are_read(tokens: int) -> None:
    _, tpu = _pair(64, 2, 16, "float32", block_len=32)
    rng, metadata = np.random.default_rng(2), _metadata(16, tokens)
    layer = tpu.init(ONE_LAYER, 4 * MAX_PAGES)[0]
    layer = layer._replace(keys=_draw(rng, *layer.keys.shape))
    queries = _draw(rng, 4, tokens, 2, 3, 64)
    dead = np.setdiff1d(np.arange(4 * MAX_PAGES), metadata.block_tables)
    spoiled = layer._replace(keys=layer.keys.at[dead].set(jnp.nan))
    longer = metadata._replace(
        block_tables=jnp.where(metadata.block_tables == 0, int(dead[0]), metadata.block_tables)
        .at[3]
        .set(0)
    )
    attend = jax.jit(tpu.attend, compiler_options=QUICKLY)
    np.testing.assert_array_equal(
        attend(queries, spoiled, longer), attend(queries, layer, metadata)
    )


def test_a_shard_of_heads_is_attended_to_alone() -> None:
    _, tpu = _pair(64, 2, 16, "int8")
    _, shard = _pair(64, 1, 16, "int8")
    rng, metadata = np.random.default_rng(3), _metadata(16, 1)
    layer = _for_tpu(tpu, _filled(rng, _pair(64, 2, 16, "int8")[0]))
    new = (_draw(rng, 4, 1, 2, 64), _draw(rng, 4, 1, 2, 64), _draw(rng, 4, 1, 2, 3, 64))
    heads, tokens = PartitionSpec(None, "model"), PartitionSpec(None, None, "model")
    sharded = jax.shard_map(
        partial(_step.__wrapped__, shard),  # options are those of the outermost program
        mesh=jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(heads, tokens, PartitionSpec()),
        out_specs=(heads, tokens),
        check_vma=False,
    )
    for got, wanted in zip(
        jax.tree.leaves(jax.jit(sharded, compiler_options=QUICKLY)(layer, new, metadata)),
        jax.tree.leaves(_step(tpu, layer, new, metadata)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)


def test_int8_keys_and_values_are_within_half_a_step_of_the_given_ones() -> None:
    x = _draw(np.random.default_rng(4), 50, 64).at[0].set(0.0)
    whole, scales = quantize(x)
    assert whole.dtype == jnp.int8
    error = jnp.abs(whole.astype(jnp.float32) * scales[:, None] - x)
    np.testing.assert_allclose(scales[1:], jnp.abs(x[1:]).max(axis=1) / 127, rtol=1e-6)
    assert (error <= scales[:, None] * 0.5001).all()


def test_int8_attention_is_near_that_over_floats() -> None:
    rng, metadata = np.random.default_rng(5), _metadata(16, 8)
    new = (_draw(rng, 4, 8, 2, 64), _draw(rng, 4, 8, 2, 64), _draw(rng, 4, 8, 2, 3, 64))
    mixed = []
    for dtype in ("float32", "int8"):
        attention = _pair(64, 2, 16, dtype)[0]
        layer = attention.init(ONE_LAYER, 4 * MAX_PAGES)[0]
        mixed.append(_step(attention, layer, new, metadata)[1][0])
    np.testing.assert_allclose(mixed[1], mixed[0], atol=0.03)


def test_a_table_larger_than_the_memory_for_scalars_is_attended_with() -> None:
    reference, tpu = _pair(64, 1, 16, "float32", 32)
    rng, metadata = np.random.default_rng(6), _metadata(16, 1)
    rows, wide = len(metadata.positions), 2**17
    tables = jnp.zeros((rows, wide), jnp.int32).at[:, :MAX_PAGES].set(metadata.block_tables)
    layer, queries = _filled(rng, reference), _draw(rng, rows, 1, 1, 2, 64)
    expected = jax.jit(reference.attend)(queries, layer, metadata)
    got = jax.jit(tpu.attend)(queries, _for_tpu(tpu, layer), metadata._replace(block_tables=tables))
    np.testing.assert_allclose(got[:3], expected[:3], atol=2e-5)
