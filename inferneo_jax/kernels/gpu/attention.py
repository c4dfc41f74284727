"""Paged attention for NVIDIA GPUs: a Pallas kernel, compiled by Triton, that reads pages in place.

One program of the grid takes a block of queries that share a KV head and walks the live positions
of their row, some at a time, under an online softmax (arXiv:1805.02867, arXiv:2307.08691), looking
up each position's page in the row's table: nothing is gathered beforehand, no dead page is read.
Few queries over a long sequence would leave most of the GPU idle, so the positions of a row are
then split between programs, whose results XLA joins (https://pytorch.org/blog/flash-decoding).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from inferneo_jax.layers.cache import AttentionMetadata, LayerCache, PagedAttention

_MASKED = -1e30
"""Finite, so that a program whose keys are all masked gives numbers and not NaN."""

_TINY = 1e-30
_LOG2_E = math.log2(math.e)
_MULTIPROCESSORS = 132
"""Of an H100. Only how the work is shared out depends on it."""


@dataclass(frozen=True)
class GpuPagedAttention(PagedAttention):
    """Attention over paged keys and values that reads only live pages, where they lie.

    Products are taken in bfloat16 unless the cache is float32, sums and the softmax always in
    float32. With ``interpret`` the kernel runs on any platform, slowly; inside ``jax.shard_map``
    that needs ``check_vma=False``.
    """

    interpret: bool = False

    def attend(
        self,
        queries: Float[Array, "rows tokens kv_heads group head_dim"],
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> Float[Array, "rows tokens kv_heads group head_dim"]:
        """Softmax of scaled products over all keys at or before each token's position."""
        if cache.keys.dtype.itemsize == 1 and cache.keys.size >= 2**31:
            # Up to 4 GiB an array is indexed by signed 32-bit integers, which such a one overflows.
            return super().attend(queries, cache, metadata)
        rows, tokens, kv_heads, group, _ = queries.shape
        blocks = _cut(
            queries.shape, cache.keys.dtype, metadata.block_tables.shape[1] * self.page_len
        )
        shape = (blocks.splits, *queries.shape)
        varies = jax.typeof(queries).mat
        outputs, log_totals = pl.pallas_call(
            partial(_attend, blocks),
            grid=(pl.cdiv(tokens * group, blocks.queries), blocks.splits, kv_heads, rows),
            out_shape=[
                jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varies),
                jax.ShapeDtypeStruct(shape[:-1], jnp.float32, manual_axis_type=varies),
            ],
            compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            interpret=self.interpret,
            name="paged_attention",
        )(
            metadata.block_tables,
            metadata.positions,
            queries,
            cache.keys,
            cache.values,
            *_scales(cache),
        )
        return _join(outputs, log_totals)


class _Blocks(NamedTuple):
    """How the work is cut: static, so that one program serves all live lengths."""

    queries: int
    positions: int
    dims: int
    splits: int
    warps: int
    stages: int


def _cut(shape: tuple[int, ...], dtype: jnp.dtype, max_len: int) -> _Blocks:
    """Blocks for queries ``[rows, tokens, kv_heads, group, head_dim]`` over ``max_len`` positions.

    Tensor cores take no fewer than 16 queries, and Triton only powers of two.
    """
    rows, tokens, kv_heads, group, head_dim = shape
    dims = max(pl.next_power_of_2(head_dim), 16)
    programs = rows * kv_heads * pl.cdiv(tokens * group, 64)
    if dtype == jnp.float32:  # on plain cores: more would spill their registers
        most, positions, stages = 16, min(64, 4096 // dims), 2
    else:
        most = 128 if dims <= 128 and programs >= 2 * _MULTIPROCESSORS else 64
        positions = min(64, 8192 // dims)
        stages = 3 if dims <= 128 else 2  # within 99 KiB of shared memory, for all since Ampere
    queries = min(max(pl.next_power_of_2(tokens * group), 16), most)
    # Small blocks wait for memory and large ones compute: four to a multiprocessor, or one. A split
    # of fewer positions than these costs more than it brings.
    programs = rows * kv_heads * pl.cdiv(tokens * group, queries)
    splits = max(1, min(_MULTIPROCESSORS * 64 // queries // programs, max_len // 256))
    warps = 8 if queries * dims > 8192 else 4
    return _Blocks(queries, positions, dims, splits, warps, stages)


def _scales(cache: LayerCache) -> tuple[Float[Array, "pages kv_heads page_len"], ...]:
    """The scales of int8 keys and values, or nothing."""
    scales = (cache.key_scales, cache.value_scales)
    return tuple(array.squeeze(2) for array in scales if array is not None)


def _attend(blocks: _Blocks, block_tables: Any, positions: Any, queries: Any, *rest: Any) -> None:
    """The kernel: one block of one row's queries over one split of its positions.

    All are references to whole arrays. Writes the block's ``outputs``, each normalized over its
    split, and the base-2 logarithms of what they were divided by.
    """
    keys, values, *scales, outputs, log_totals = rest
    _, tokens, _, group, head_dim = queries.shape
    page_len = keys.shape[2]
    product_dtype = jnp.float32 if keys.dtype == jnp.float32 else jnp.bfloat16
    split, head, row = (pl.program_id(i) for i in (1, 2, 3))

    index = pl.program_id(0) * blocks.queries + jnp.arange(blocks.queries, dtype=jnp.int32)
    token, member = lax.div(index, group), lax.rem(index, group)
    real = index < tokens * group
    dim = jnp.arange(blocks.dims, dtype=jnp.int32)[None, :]
    inside = dim < head_dim

    place = (row, token[:, None], head, member[:, None], dim)
    query = plt.load(queries.at[place], mask=real[:, None] & inside, other=0.0)
    query = query.astype(product_dtype)
    last_seen = plt.load(positions.at[row, token], mask=real, other=0)
    length = jnp.minimum(jnp.max(last_seen) + 1, block_tables.shape[1] * page_len)
    num_blocks = pl.cdiv(length, blocks.positions)
    share = pl.cdiv(num_blocks, blocks.splits)

    def positions_of(i: Array) -> Array:
        return i * blocks.positions + jnp.arange(blocks.positions, dtype=jnp.int32)

    def pages_of(i: Array) -> Array:
        position = positions_of(i)
        at = block_tables.at[row, lax.div(position, page_len)]
        return plt.load(at, mask=position < length, other=0)

    # Pages are looked up a turn ahead, so that Triton can copy keys and values ahead of their use.
    def block(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        page, peak, total, mixed = carry
        position = positions_of(i)
        live, offset = position < length, lax.rem(position, page_len)

        def read(pages: Any) -> Array:
            at = pages.at[page[:, None], head, offset[:, None], dim]
            return plt.load(at, mask=live[:, None] & inside, other=0).astype(product_dtype)

        def read_scales(pages: Any) -> Array:
            return plt.load(pages.at[page, head, offset], mask=live, other=0)[None, :]

        scores = _dot(query, read(keys).T) * (head_dim**-0.5 * _LOG2_E)
        if scales:
            scores *= read_scales(scales[0])
        scores = jnp.where(position[None, :] <= last_seen[:, None], scores, _MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.exp2(scores - new_peak[:, None])
        decay = jnp.exp2(peak - new_peak)
        total = total * decay + weights.sum(axis=1)
        if scales:
            weights *= read_scales(scales[1])
        mixed = mixed * decay[:, None] + _dot(weights.astype(product_dtype), read(values))
        return pages_of(i + 1), new_peak, total, mixed

    column = jnp.zeros((blocks.queries,), jnp.float32)
    empty = (column + _MASKED, column, jnp.zeros((blocks.queries, blocks.dims), jnp.float32))
    start = split * share
    stop = jnp.minimum(start + share, num_blocks)
    _, peak, total, mixed = lax.fori_loop(start, stop, block, (pages_of(start), *empty))

    total = jnp.maximum(total, _TINY)
    mask = real[:, None] & inside
    plt.store(outputs.at[(split, *place)], mixed / total[:, None], mask=mask)
    log_total = peak + jnp.log(total) * _LOG2_E
    plt.store(log_totals.at[split, row, token, head, member], log_total, mask=real)


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    # The highest precision concerns float32 alone, which would be rounded to 11 bits without it.
    return plt.dot(a, b, precision=lax.Precision.HIGHEST)


def _join(
    outputs: Float[Array, "splits rows tokens kv_heads group head_dim"],
    log_totals: Float[Array, "splits rows tokens kv_heads group"],
) -> Float[Array, "rows tokens kv_heads group head_dim"]:
    """The mean of the splits' outputs, each weighed by its part in the softmax's sum."""
    if outputs.shape[0] == 1:
        return outputs[0]
    weights = jnp.exp2(log_totals - log_totals.max(axis=0, keepdims=True))
    weights /= weights.sum(axis=0, keepdims=True)
    return (outputs * weights[..., None]).sum(axis=0)
