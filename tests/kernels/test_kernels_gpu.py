"""The GPU attention kernel, interpreted on CPU, against the reference in plain XLA operations."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from inferneo_jax.kernels.gpu import attention
from inferneo_jax.kernels.gpu.attention import GpuPagedAttention
from inferneo_jax.layers.cache import AttentionMetadata, LayerCache, PagedAttention
from inferneo_jax.layers.quantization import quantize

F32, BF16, INT8 = map(jnp.dtype, ("float32", "bfloat16", "int8"))


class Case(NamedTuple):
    """Random queries, a cache of which only live places hold numbers, and the right answer."""

    attention: GpuPagedAttention
    queries: jax.Array
    cache: LayerCache
    metadata: AttentionMetadata
    expected: jax.Array


def make_case(
    head_dim: int,
    kv_heads: int,
    group: int,
    page_len: int,
    tokens: int,
    dtype: np.dtype = F32,
    max_len: int = 600,
) -> Case:
    """Four rows: long, short, sharing all but the last page of the long one, and padding."""
    rng = np.random.default_rng(head_dim + group)
    max_pages = -(-max_len // page_len)
    block_tables = np.zeros((4, max_pages), np.int32)
    block_tables[:2] = rng.permutation(np.arange(1, 2 * max_pages + 1)).reshape(2, max_pages)
    block_tables[2] = [*block_tables[0, :-1], 2 * max_pages + 1]
    starts = np.array([max_len - tokens, rng.integers(page_len), max_len - tokens - 3, 0])
    positions = starts[:, None] + np.arange(tokens)
    block_tables[1, positions[1, -1] // page_len + 1 :] = 0

    shape = (2 * max_pages + 2, kv_heads, page_len, head_dim)
    keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    queries = jnp.asarray(rng.normal(size=(4, tokens, kv_heads, group, head_dim)), F32)
    metadata = AttentionMetadata(jnp.asarray(block_tables), jnp.asarray(positions, jnp.int32))
    reference = PagedAttention(kv_heads, head_dim, page_len, dtype)
    expected = jax.jit(reference.attend)(queries, LayerCache(keys, values), metadata)

    live = np.zeros((shape[0], 1, page_len, 1), bool)
    for table, last in zip(block_tables, positions[:, -1], strict=True):
        seen = np.arange(last + 1)
        live[table[seen // page_len], 0, seen % page_len] = True
    cache = LayerCache(*(jnp.where(live, x, jnp.asarray(np.nan, dtype)) for x in (keys, values)))
    attention = GpuPagedAttention(kv_heads, head_dim, page_len, dtype, interpret=True)
    return Case(attention, queries, cache, metadata, expected)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_len", "tokens"),
    [
        (64, 3, 3, 16, 1),
        (64, 1, 9, 128, 33),
        (80, 2, 4, 32, 7),
        (96, 5, 2, 48, 1),
        (96, 1, 3, 16, 100),
        (128, 8, 4, 16, 1),
        (128, 2, 7, 64, 20),
        (256, 1, 8, 32, 1),
        (256, 2, 1, 16, 64),
        (4, 1, 1, 2, 5),
    ],
)
def test_equals_the_reference_and_reads_live_places_only(
    head_dim: int, kv_heads: int, group: int, page_len: int, tokens: int
) -> None:
    case = make_case(head_dim, kv_heads, group, page_len, tokens)
    got = jax.jit(case.attention.attend)(case.queries, case.cache, case.metadata)
    assert got.dtype == F32
    np.testing.assert_allclose(got, case.expected, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 90])
def test_equals_the_reference_in_bfloat16(tokens: int) -> None:
    case = make_case(128, 2, 4, 16, tokens, BF16)
    got = jax.jit(case.attention.attend)(case.queries, case.cache, case.metadata)
    assert got.dtype == F32
    np.testing.assert_allclose(got, case.expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("tokens", [1, 30])
def test_equals_the_reference_over_int8_with_scales(tokens: int) -> None:
    case = make_case(64, 2, 3, 16, tokens)
    arrays = [jnp.nan_to_num(array) for array in case.cache[:2]]
    (keys, key_scales), (values, value_scales) = map(quantize, arrays)
    cache = LayerCache(keys, values, key_scales[:, :, None], value_scales[:, :, None])
    expected = jax.jit(PagedAttention(2, 64, 16, INT8).attend)(case.queries, cache, case.metadata)
    attention = dataclasses.replace(case.attention, dtype=INT8)
    got = jax.jit(attention.attend)(case.queries, cache, case.metadata)
    np.testing.assert_allclose(got, expected, atol=1e-2, rtol=1e-2)


def test_split_over_two_devices_by_head_equals_the_whole() -> None:
    case = make_case(64, 2, 2, 16, 1)
    attention = dataclasses.replace(case.attention, kv_heads=1)
    heads, whole = PartitionSpec(None, None, "model"), PartitionSpec()
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    attend = jax.shard_map(
        attention.attend,
        mesh=mesh,
        in_specs=(heads, PartitionSpec(None, "model"), whole),
        out_specs=heads,
        check_vma=False,  # which Pallas' interpreter cannot do
    )
    got = jax.jit(attend)(case.queries, case.cache, case.metadata)
    np.testing.assert_allclose(got, case.expected, atol=2e-5)


@pytest.mark.parametrize(("rows", "tokens", "splits"), [(1, 1, 16), (32, 1, 2), (4, 256, 1)])
def test_few_queries_split_long_sequences(rows: int, tokens: int, splits: int) -> None:
    blocks = attention._cut((rows, tokens, 8, 4, 128), BF16, 4096)
    assert blocks.splits == splits


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, F32), (64, INT8), (64, BF16), (80, BF16), (96, BF16), (128, BF16), (256, BF16)],
    ids=str,
)
def test_lowers_to_triton_without_a_gpu(head_dim: int, dtype: np.dtype) -> None:
    attention = GpuPagedAttention(3, head_dim, 16, dtype)
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    pages = shape(dtype, 9, 3, 16, head_dim)
    for tokens in (1, 256):
        metadata = AttentionMetadata(shape(jnp.int32, 2, 8), shape(jnp.int32, 2, tokens))
        queries = shape(F32, 2, tokens, 3, 3, head_dim)
        traced = jax.jit(attention.attend).trace(queries, LayerCache(pages, pages), metadata)
        assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_an_array_whose_offsets_overflow_is_left_to_the_reference() -> None:
    byte = jnp.dtype("float8_e4m3fn")
    attention = GpuPagedAttention(8, 128, 128, byte)
    pages = jax.ShapeDtypeStruct((2**14, 8, 128, 128), byte)
    metadata = AttentionMetadata(*(jax.ShapeDtypeStruct((1, size), jnp.int32) for size in (4, 1)))
    queries = jax.ShapeDtypeStruct((1, 1, 8, 4, 128), F32)
    jaxpr = jax.make_jaxpr(attention.attend)(queries, LayerCache(pages, pages), metadata)
    assert "pallas_call" not in str(jaxpr)
