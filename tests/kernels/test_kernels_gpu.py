"""The GPU attention kernel, interpreted on CPU, against the reference in plain XLA operations."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

from inferneo_jax.kernels.gpu.attention import GpuPagedAttention
from inferneo_jax.kernels.gpu.work import Shares, Work, list_work, share_out
from inferneo_jax.layers.cache import (
    PLAIN,
    AttentionMetadata,
    AttentionVariant,
    LayerCache,
    PagedAttention,
    narrow,
)
from inferneo_jax.layers.quantization import quantize

F32, BF16, INT8, FP8 = map(jnp.dtype, ("float32", "bfloat16", "int8", "float8_e4m3fn"))
TOLERANCE = {F32: 2e-5, BF16: 1e-2, INT8: 1e-2, FP8: 1e-2}


class Case(NamedTuple):
    """Random queries, a cache of which only live places hold numbers, and the right answer."""

    attention: GpuPagedAttention
    queries: jax.Array
    cache: LayerCache
    metadata: AttentionMetadata
    variant: AttentionVariant
    expected: jax.Array


def make_case(
    head_dim: int,
    kv_heads: int,
    group: int,
    page_len: int,
    tokens: int,
    dtype: np.dtype = F32,
    max_len: int = 600,
    variant: AttentionVariant = PLAIN,
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
    keys, values = (jnp.asarray(rng.normal(size=shape), F32) for _ in range(2))
    queries = jnp.asarray(rng.normal(size=(4, tokens, kv_heads, group, head_dim)), F32)
    metadata = AttentionMetadata(jnp.asarray(block_tables), jnp.asarray(positions, jnp.int32))
    if dtype == INT8:
        (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
        cache = LayerCache(keys, values, key_scales[:, :, None], value_scales[:, :, None])
    else:
        cache = LayerCache(narrow(keys, dtype), narrow(values, dtype))
    if variant.sinks is not None:
        variant = variant._replace(sinks=jnp.asarray(rng.normal(size=(kv_heads, group)), F32))
    reference = PagedAttention(kv_heads, head_dim, page_len, dtype)
    expected = jax.jit(partial(reference.attend, variant=variant))(queries, cache, metadata)

    live = np.zeros((shape[0], 1, page_len, 1), bool)
    for table, last in zip(block_tables, positions[:, -1], strict=True):
        seen = np.arange(last + 1)
        live[table[seen // page_len], 0, seen % page_len] = True
    spoiled = -128 if dtype == INT8 else np.nan
    cache = cache._replace(
        keys=jnp.where(live, cache.keys, jnp.asarray(spoiled, dtype)),
        values=jnp.where(live, cache.values, jnp.asarray(spoiled, dtype)),
    )
    attention = GpuPagedAttention(kv_heads, head_dim, page_len, dtype, interpret=True)
    return Case(attention, queries, cache, metadata, variant, expected)


def check(case: Case) -> None:
    attend = partial(case.attention.attend, variant=case.variant)
    got = jax.jit(attend)(case.queries, case.cache, case.metadata)
    assert got.dtype == F32
    tolerance = TOLERANCE[case.attention.dtype]
    np.testing.assert_allclose(got, case.expected, atol=tolerance, rtol=tolerance)


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
    check(make_case(head_dim, kv_heads, group, page_len, tokens))


SINKS = jnp.zeros((1, 1), jnp.float32)  # make_case draws them
VARIANTS = {
    "plain": PLAIN,
    "window": AttentionVariant(window=100),
    "narrow": AttentionVariant(window=1),
    "softcap": AttentionVariant(softcap=2.0),
    "sinks": AttentionVariant(sinks=SINKS),
    "all": AttentionVariant(window=300, softcap=3.0, sinks=SINKS),
}


@pytest.mark.parametrize(
    ("dtype", "variant"),
    [(F32, each) for each in VARIANTS]
    + [(dtype, each) for dtype in (BF16, INT8, FP8) for each in ("plain", "all")],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 90])
def test_equals_the_reference_in_every_dtype_and_variant(
    tokens: int, dtype: np.dtype, variant: str
) -> None:
    check(make_case(64, 2, 3, 16, tokens, dtype, variant=VARIANTS[variant]))


@pytest.mark.parametrize("dtype", [BF16, INT8, FP8], ids=str)
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_equals_the_reference_for_every_head_size(head_dim: int, dtype: np.dtype) -> None:
    check(make_case(head_dim, 1, 4, 16, 1, dtype, variant=VARIANTS["all"]))


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


@pytest.mark.parametrize(
    ("rows", "tokens", "segment", "split"),
    [
        (1, 1, 256, True),
        (32, 1, 1024, True),
        (32, 6, 1024, True),
        (1, 256, 1024, True),
        (8, 256, 8192, False),
    ],
)
def test_few_queries_split_long_sequences(
    rows: int, tokens: int, segment: int, split: bool
) -> None:
    shares = share_out((rows, tokens, 8, 4, 128), 64, 8192, None)
    assert (shares.segment, shares.split) == (segment, split)


def items_of(work: Work, positions: np.ndarray) -> list[set[int]]:
    """The positions that the items of each row cover, no position twice."""
    covered: list[set[int]] = [set() for _ in positions]
    for row, start, stop in zip(*(each.tolist() for each in work[:3]), strict=True):
        if row >= 0:
            mine = set(range(start, min(stop, int(positions[row].max()) + 1)))
            assert not covered[row] & mine
            covered[row] |= mine
    return covered


@pytest.mark.parametrize("window", [None, 700])
def test_a_long_row_has_segments_of_its_own(window: int | None) -> None:
    positions = np.asarray([[99_999], [0], [1023], [1024], [5]], np.int32)
    metadata = AttentionMetadata(jnp.zeros((5, 8192), jnp.int32), jnp.asarray(positions))
    shares = Shares(120, 1024, 5)
    work = list_work(shares, metadata, 2**17, window, 64)
    assert set((work.stops - work.starts).tolist()) == {1024}
    assert np.diff(work.offsets).tolist() == ([98, 1, 1, 2, 1] if window is None else [1] * 5)
    for seen, last in zip(items_of(work, positions), positions[:, 0], strict=True):
        first = 0 if window is None else max(last - window + 1, 0)
        assert seen >= set(range(first, last + 1))


def test_segments_are_longer_where_there_would_be_too_many() -> None:
    positions = np.full((4, 1), 9_999, np.int32)
    metadata = AttentionMetadata(jnp.zeros((4, 1024), jnp.int32), jnp.asarray(positions))
    work = list_work(Shares(14, 1024, 4), metadata, 16_384, None, 64)
    assert set((work.stops - work.starts).tolist()) == {4096}
    assert items_of(work, positions) == [set(range(10_000))] * 4
    assert work.rows[12:].tolist() == [-1, -1]


def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    case = make_case(64, 2, 2, 16, 1)
    attend = jax.jit(case.attention.attend)
    alone = case.metadata._replace(block_tables=case.metadata.block_tables.at[1:].set(0))
    alone = alone._replace(positions=alone.positions.at[1:].set(0))
    cache = case.cache._replace(
        keys=jnp.nan_to_num(case.cache.keys), values=jnp.nan_to_num(case.cache.values)
    )
    got, wanted = (attend(case.queries, cache, each)[0] for each in (alone, case.metadata))
    np.testing.assert_array_equal(got, wanted)


# JAX deprecates Triton, which remains for GPUs that Mosaic does not support, until JAX removes it.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, F32), (64, INT8), (64, FP8), *((size, BF16) for size in (64, 80, 96, 128, 256))],
    ids=str,
)
def test_lowers_to_triton_without_a_gpu(head_dim: int, dtype: np.dtype) -> None:
    attention = GpuPagedAttention(3, head_dim, 16, dtype)
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    pages = shape(dtype, 9, 3, 16, head_dim)
    for tokens in (1, 256):
        metadata = AttentionMetadata(shape(jnp.int32, 2, 8), shape(jnp.int32, 2, tokens))
        queries = shape(F32, 2, tokens, 3, 3, head_dim)
        attend = partial(
            attention.attend, variant=VARIANTS["all"]._replace(sinks=jnp.zeros((3, 3)))
        )
        # Since jax 0.11, this must be told which GPU it is for.
        ada = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA L4", None, "gpu"))
        with use_abstract_mesh(ada):
            traced = jax.jit(attend).trace(queries, LayerCache(pages, pages), metadata)
            lowered = traced.lower(lowering_platforms=("cuda",))
        assert "xla.gpu.triton" in lowered.as_text()


def test_an_array_whose_offsets_overflow_is_left_to_the_reference() -> None:
    byte = jnp.dtype("float8_e4m3fn")
    attention = GpuPagedAttention(8, 128, 128, byte)
    pages = jax.ShapeDtypeStruct((2**14, 8, 128, 128), byte)
    metadata = AttentionMetadata(*(jax.ShapeDtypeStruct((1, size), jnp.int32) for size in (4, 1)))
    queries = jax.ShapeDtypeStruct((1, 1, 8, 4, 128), F32)
    jaxpr = jax.make_jaxpr(attention.attend)(queries, LayerCache(pages, pages), metadata)
    assert "pallas_call" not in str(jaxpr)
